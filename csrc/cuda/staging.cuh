// Rows of logits in shared memory: fetched while another row is computed, and copied out as their gradient.
//
// A stage holds one row of the block's tile and its halo as planes: the row's pixels in class 0, then in class 1, and
// so on. With kPieces, threads copy pieces of 16 bytes: the logits in memory are planes [C][H][W] then, whose rows all
// begin at a multiple of 16 bytes. Otherwise they copy single elements of planes or of pixels [H][W][C], whose rows are
// transposed on the way.
//
// Invariants: all threads of a block call fetch, arrive and copy_out together. After arrive's barrier no thread reads
// the stage that the next fetch overwrites.
#pragma once

#include "../params.h"
#include "thread_tile.cuh"
#include "tiles.h"
#include "types.cuh"

namespace eroseg::cuda {

constexpr int kBytesOfPiece = 16;  // the largest that a thread's asynchronous copy takes

// The shared memory of Staging.
struct StagingMemory {
  int pitch = 0;  // elements of a staged row of a plane, whole vectors
  int stage = 0;  // bytes of a staged row of all planes
  int stages = 0;

  int64_t bytes() const { return static_cast<int64_t>(stages) * stage; }

  template <class Type>
  static StagingMemory of(const Input& input, const Tiles& tiles, int slice_classes, int stages) {
    constexpr int kElement = sizeof(typename Type::Element), kUnit = kBytesOfPiece / kElement;
    constexpr int kVector = Vector<Type>::kElements;
    const int pixels = tiles.width + (tiles.halo > 0 ? 2 * kUnit : 0);
    StagingMemory memory;
    memory.stages = stages;
    // Neighbouring threads write neighbouring classes of a channels_last pixel: an odd number of vectors keeps them in
    // different banks.
    memory.pitch = input.logits.channels_last ? (pixels / kVector | 1) * kVector
                                              : pitch_of_planes(pixels, kElement, slice_classes, tiles.groups);
    const int bytes = memory.pitch * static_cast<int>(input.shape.channels) * kElement;
    memory.stage = (bytes + kBytesOfPiece - 1) / kBytesOfPiece * kBytesOfPiece;
    return memory;
  }

 private:
  // Half a warp reads a vector a thread, 128 bytes, without conflicts if they are in different banks. With 2, 4 or 8
  // threads for a vector of pixels, these are 8, 4 or 2 neighbouring vectors of as many planes, which are slice_classes
  // planes apart. That distance should be 64, 32 or 16 bytes times an odd number.
  static int pitch_of_planes(int pixels, int element, int slice_classes, int groups) {
    const int unit = kBytesOfPiece / element, wanted = 128 / groups;
    const auto off = [&](int pitch) { return std::abs(slice_classes * pitch * element % (2 * wanted) - wanted); };
    int best = pixels;
    for (int pitch = pixels; groups > 1 && pitch < pixels + 8 * unit; pitch += unit) {
      if (off(pitch) < off(best)) best = pitch;
    }
    return best;
  }
};

// How a launch of a kernel over rows is laid out: its tiles, their shared memory, and the classes of a thread's slice
// (class_slice.cuh; the last one may be smaller). Where there are several slices, that is an odd number.
struct RowsPlan {
  Tiles tiles;
  StagingMemory memory;
  int slice_classes = 0;
};

template <class Type, bool kPieces>
class Staging {
 public:
  using Element = typename Type::Element;

  // `memory` has StagingMemory's bytes and is aligned to 16 of them; `grad` is like the logits, or null if nothing
  // is copied out.
  __device__ __forceinline__ Staging(const Input& input, void* grad, const RowsPlan& plan, const ThreadTile& tile,
                                     unsigned char* memory)
      : layout_(plan.memory),
        memory_(memory),
        channels_(static_cast<int>(input.shape.channels)),
        height_(static_cast<int>(input.shape.height)),
        width_(static_cast<int>(input.shape.width)),
        by_pixels_(!kPieces && input.logits.channels_last),
        left_(tile.left),
        own_(tile.width) {
    const int halo = plan.tiles.halo > 0 ? kBytesOfPiece / static_cast<int>(sizeof(Element)) : 0;
    from_ = max(tile.left - halo, 0);
    to_ = min(tile.left + tile.width + halo, width_);
    const int64_t offset = tile.image * channels_ * height_ * width_;
    logits_ = static_cast<const Element*>(input.logits.data) + offset;
    grad_ = grad == nullptr ? nullptr : static_cast<Element*>(grad) + offset;
    const int most_columns = by_pixels_ ? channels_ : (plan.tiles.width + 2 * halo) / kPiece;
    columns_at_once_ = min(most_columns, threads_of_block());
    lines_at_once_ = threads_of_block() / columns_at_once_;
    column_ = thread_of_block() % columns_at_once_;
    line_ = thread_of_block() / columns_at_once_;
  }

  // A pixel of stage s in class 0; its other classes follow at multiples of the pitch.
  __device__ __forceinline__ Element* at(int s, int pixel) const {
    return reinterpret_cast<Element*>(memory_ + s * layout_.stage) + pixel - from_;
  }

  // Begins to fetch row y of the image, if there is one, to stage s.
  __device__ __forceinline__ void fetch(int y, int s) const {
    if (y < 0 || y >= height_) return;
    copy<false>(const_cast<Element*>(logits_) + offset_of(y, from_), at(s, from_), to_ - from_);
  }

  // Waits for what has been fetched.
  __device__ __forceinline__ void arrive() const {
    wait_for_copies();
    __syncthreads();
  }

  // Copies the tile's own pixels of row y from stage s to the gradient, once all threads have written them.
  __device__ __forceinline__ void copy_out(int y, int s) const {
    __syncthreads();
    copy<true>(grad_ + offset_of(y, left_), at(s, left_), own_);
  }

 private:
  static constexpr int kPiece = kPieces ? kBytesOfPiece / static_cast<int>(sizeof(Element)) : 1;

  __device__ __forceinline__ int offset_of(int y, int pixel) const {
    return (y * width_ + pixel) * (by_pixels_ ? channels_ : 1);
  }

  // Copies n pixels of all channels. Lines and columns are the channels and the pieces of their pixels, or for
  // channels_last the pixels and their channels: neighbouring threads copy neighbouring columns, which lie one behind
  // the other in memory.
  template <bool kOut>
  __device__ __forceinline__ void copy(Element* global, Element* staged, int n) const {
    struct alignas(kPiece * sizeof(Element)) Piece {
      Element elements[kPiece];
    };
    constexpr bool kIsAsync = !kOut && sizeof(Piece) >= 4;
    // Pieces that are read before the first of them is written. Elements of 2 bytes are not copied asynchronously, and
    // it takes many of them to have as many bytes under way as hide the latency of memory.
    constexpr int kAtOnce = kPieces ? 4 : 16;
    const int columns = by_pixels_ ? channels_ : n / kPiece, lines = by_pixels_ ? n : channels_;
    const int line_in_memory = by_pixels_ ? channels_ : height_ * width_,
              line_in_stage = by_pixels_ ? 1 : layout_.pitch;
    const int column_in_stage = by_pixels_ ? layout_.pitch : kPiece;
    if (line_ >= lines_at_once_) return;
    for (int column = column_; column < columns; column += columns_at_once_) {
      const auto in_memory = [&](int line) {
        return reinterpret_cast<Piece*>(global + column * kPiece + line * line_in_memory);
      };
      const auto in_stage = [&](int line) {
        return reinterpret_cast<Piece*>(staged + column * column_in_stage + line * line_in_stage);
      };
#pragma unroll 1
      for (int first = line_; first < lines; first += kAtOnce * lines_at_once_) {
        Piece held[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int line = first + k * lines_at_once_;
          if (line >= lines) break;
          if constexpr (kIsAsync) {
            copy_async<sizeof(Piece)>(in_stage(line), in_memory(line));
          } else {
            held[k] = kOut ? *in_stage(line) : *in_memory(line);
          }
        }
        if constexpr (!kIsAsync) {
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            const int line = first + k * lines_at_once_;
            if (line < lines) (kOut ? *in_memory(line) : *in_stage(line)) = held[k];
          }
        }
      }
    }
  }

  const StagingMemory& layout_;
  unsigned char* memory_;
  int channels_, height_, width_;
  bool by_pixels_;                       // whether the logits are channels_last
  int left_, own_;                       // the tile's own pixels
  int from_, to_;                        // those that are staged
  int column_, line_;                    // which the thread copies first
  int columns_at_once_, lines_at_once_;  // that the block copies
  const Element* logits_;
  Element* grad_;
};

}  // namespace eroseg::cuda
