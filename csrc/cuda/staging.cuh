// Rows of logits in shared memory: fetched there while another row is at work, and copied out as their gradient.
//
// A stage holds one row of the block's strip and its halo as planes: the row's pixels in class 0, then in class 1, and
// so on. Where the planes' rows in memory all begin at a multiple of 16 bytes, threads copy pieces of 16 bytes.
// Elsewhere they copy single elements, which transposes channels_last rows on the way.
//
// Invariants: all threads of a block call fetch, arrive and copy_out together. After arrive's barrier no thread reads
// the stage that the next fetch overwrites.
#pragma once

#include "../jobs.h"
#include "place.cuh"
#include "strips.h"
#include "types.cuh"

namespace eroseg::cuda {

// How logits lie in memory: as planes [C][H][W], all of whose rows begin at a multiple of 16 bytes or not, or as pixels
// [H][W][C].
enum class Layout { kPlanes, kUnalignedPlanes, kChannelsLast };

constexpr int kBytesOfPiece = 16;  // the largest that a thread's asynchronous copy takes

// The shared memory of Staging.
struct StagingMemory {
  int pitch = 0;  // elements of a staged row of a plane, whole words
  int stage = 0;  // bytes of a staged row of all planes
  int stages = 0;

  int64_t bytes() const { return static_cast<int64_t>(stages) * stage; }

  template <class Type, Layout kLayout>
  static StagingMemory of(const Input& input, const Strips& strips, int words_of_share, int stages) {
    constexpr int kElement = sizeof(typename Type::Element), kUnit = kBytesOfPiece / kElement;
    constexpr int kWord = Word<Type>::kElements;
    const int pixels = strips.width + (strips.halo > 0 ? 2 * kUnit : 0);
    StagingMemory memory;
    memory.stages = stages;
    // Neighbouring threads write neighbouring classes of a channels_last pixel: an odd number of words keeps them in
    // different banks.
    memory.pitch = kLayout == Layout::kChannelsLast ? (pixels / kWord | 1) * kWord
                                                    : pitch_of_planes(pixels, kElement, words_of_share, strips.groups);
    const int bytes = memory.pitch * static_cast<int>(input.shape.channels) * kElement;
    memory.stage = (bytes + kBytesOfPiece - 1) / kBytesOfPiece * kBytesOfPiece;
    return memory;
  }

 private:
  // Half a warp reads a word each without conflicts if they are of different banks, of which there are 128 bytes. With
  // 2, 4 or 8 threads for a word of pixels, these are 8, 4 or 2 neighbouring words of as many planes, which are a
  // thread's share of planes apart. That distance should be 64, 32 or 16 bytes times an odd number.
  static int pitch_of_planes(int pixels, int element, int words_of_share, int groups) {
    const int unit = kBytesOfPiece / element, wanted = 128 / groups;
    const auto off = [&](int pitch) { return std::abs(words_of_share * pitch * element % (2 * wanted) - wanted); };
    int best = pixels;
    for (int pitch = pixels; groups > 1 && pitch < pixels + 8 * unit; pitch += unit) {
      if (off(pitch) < off(best)) best = pitch;
    }
    return best;
  }
};

// How a launch of a kernel over rows is laid out: its blocks, their shared memory, and the classes that each but the
// last of the threads of a word of pixels has (share.cuh). Where several threads share them, this is odd.
struct RowsPlan {
  Strips strips;
  StagingMemory memory;
  int words_of_share = 0;
};

template <class Type, Layout kLayout>
class Staging {
 public:
  using Element = typename Type::Element;

  // `memory` has StagingMemory's bytes and is aligned to 16 of them; `grad` is like the logits, or null if nothing
  // is copied out.
  __device__ __forceinline__ Staging(const Input& input, void* grad, const RowsPlan& plan, const Place& place,
                                     unsigned char* memory)
      : layout_(plan.memory),
        memory_(memory),
        channels_(static_cast<int>(input.shape.channels)),
        height_(static_cast<int>(input.shape.height)),
        width_(static_cast<int>(input.shape.width)),
        left_(place.left),
        own_(place.width) {
    const int halo = plan.strips.halo > 0 ? kBytesOfPiece / static_cast<int>(sizeof(Element)) : 0;
    from_ = max(place.left - halo, 0);
    to_ = min(place.left + place.width + halo, width_);
    const int64_t offset = place.image * channels_ * height_ * width_;
    logits_ = static_cast<const Element*>(input.logits.data) + offset;
    grad_ = grad == nullptr ? nullptr : static_cast<Element*>(grad) + offset;
    const int most_columns = kIsPixels ? channels_ : (plan.strips.width + 2 * halo) / kPiece;
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

  // Copies the strip's own pixels of row y from stage s to the gradient, once all threads have put them there.
  __device__ __forceinline__ void copy_out(int y, int s) const {
    __syncthreads();
    copy<true>(grad_ + offset_of(y, left_), at(s, left_), own_);
  }

 private:
  static constexpr bool kIsPixels = kLayout == Layout::kChannelsLast;
  static constexpr int kPiece = kLayout == Layout::kPlanes ? kBytesOfPiece / static_cast<int>(sizeof(Element)) : 1;

  __device__ __forceinline__ int offset_of(int y, int pixel) const {
    return (y * width_ + pixel) * (kIsPixels ? channels_ : 1);
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
    constexpr int kAtOnce = 4;  // pieces that are read before the first of them is written
    const int columns = kIsPixels ? channels_ : n / kPiece, lines = kIsPixels ? n : channels_;
    const int line_in_memory = kIsPixels ? channels_ : height_ * width_, line_in_stage = kIsPixels ? 1 : layout_.pitch;
    const int column_in_stage = kIsPixels ? layout_.pitch : kPiece;
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
  int left_, own_;                       // the strip's own pixels
  int from_, to_;                        // those that are staged
  int column_, line_;                    // which the thread copies first
  int columns_at_once_, lines_at_once_;  // that the block copies
  const Element* logits_;
  Element* grad_;
};

}  // namespace eroseg::cuda
