// Rows of logits in shared memory: fetched there while another row is at work, and copied out as their gradient.
//
// Every thread of a block copies pieces of 16 bytes, or of fewer where rows are not aligned, whichever pixels these
// belong to. A stage holds one row of the block's strip and its halo.
//
// Invariants: all threads of a block call fetch, arrive and copy_out together. arrive has a barrier: a stage that is
// fetched after it has been used by nobody since.
#pragma once

#include "../jobs.h"
#include "place.cuh"
#include "strips.h"
#include "types.cuh"

namespace eroseg::cuda {

// How logits lie in memory: as planes [C][H][W], or as pixels [H][W][C].
enum class Layout { kPlanes, kChannelsLast };

constexpr int kBytesOfPiece = 16;  // the largest that a thread's asynchronous copy takes

// The shared memory of Staging.
//
// Half a warp reads a word each in one go if they are of different banks, of which there are 128 bytes: with 2, 4 or 8
// threads for a word of pixels, 8, 4 or 2 neighbouring words of as many planes, which are an odd number of planes
// apart. So planes are padded to 64, 32 or 16 bytes times an odd number.
struct StagingMemory {
  int pitch;  // pixels of a staged row
  int stage;  // bytes of one
  int stages;

  template <class Type>
  static __host__ __device__ StagingMemory of(const Input& input, const Strips& strips, int stages) {
    const int unit = kBytesOfPiece / static_cast<int>(sizeof(typename Type::Element));
    int units = strips.width / unit + (strips.halo > 0 ? 2 : 0);
    if (!input.logits.channels_last && strips.groups > 1) {
      while (units % (16 / strips.groups) != 8 / strips.groups) ++units;
    }
    const int pitch = units * unit;
    const int bytes = pitch * static_cast<int>(input.shape.channels * sizeof(typename Type::Element));
    // A channels_last row begins anywhere within 16 bytes.
    return {pitch, bytes + (input.logits.channels_last ? kBytesOfPiece : 0), stages};
  }

  __host__ __device__ int64_t bytes() const { return static_cast<int64_t>(stages) * stage; }
};

template <class Type, Layout kLayout>
class Staging {
 public:
  using Element = typename Type::Element;

  // `memory` has StagingMemory's bytes and is aligned to 16 of them; `grad` is like the logits.
  __device__ __forceinline__ Staging(const Input& input, void* grad, const Strips& strips, const Place& place,
                                     int stages, unsigned char* memory)
      : layout_(StagingMemory::of<Type>(input, strips, stages)),
        memory_(memory),
        channels_(static_cast<int>(input.shape.channels)),
        height_(static_cast<int>(input.shape.height)),
        width_(static_cast<int>(input.shape.width)),
        left_(place.left),
        own_(place.width) {
    const int halo = strips.halo > 0 ? kUnit : 0;
    from_ = place.left - halo < 0 ? 0 : place.left - halo;
    to_ = place.left + place.width + halo < width_ ? place.left + place.width + halo : width_;
    const int64_t offset = place.image * channels_ * height_ * width_;
    logits_ = static_cast<const Element*>(input.logits.data) + offset;
    grad_ = static_cast<Element*>(grad) + offset;
    const uintptr_t all = reinterpret_cast<uintptr_t>(logits_) | reinterpret_cast<uintptr_t>(grad_) |
                          static_cast<uintptr_t>(width_ * static_cast<int>(sizeof(Element)));
    piece_ = all % kBytesOfPiece == 0 ? kBytesOfPiece : (all % 4 == 0 ? 4 : static_cast<int>(sizeof(Element)));
    const int of_piece = piece_ / static_cast<int>(sizeof(Element));
    in_ = Share::of((to_ - from_) / of_piece, channels_);
    out_ = Share::of(own_ / of_piece, channels_);
  }

  // A channel of a pixel of the image's row y, which stands in stage s.
  __device__ __forceinline__ Element* at(int y, int s, int pixel, int channel) const {
    return stage(y, s) + offset_of(pixel - from_, channel);
  }

  // From a pixel to another one and from a channel to another one, in elements.
  __device__ __forceinline__ int offset_of(int pixel, int channel) const {
    return kLayout == Layout::kChannelsLast ? pixel * channels_ + channel : channel * layout_.pitch + pixel;
  }

  // Begins to fetch row y of the image, if there is one, to stage s.
  __device__ __forceinline__ void fetch(int y, int s) {
    if (y < 0 || y >= height_) return;
    if constexpr (kLayout == Layout::kChannelsLast) {
      const Element* row = logits_ + (y * width_ + from_) * channels_;
      copy_run<false>(const_cast<Element*>(row), stage(y, s), (to_ - from_) * channels_);
    } else {
      copy_planes<false>(const_cast<Element*>(logits_) + y * width_ + from_, stage(y, s), to_ - from_);
    }
  }

  // Waits for what has been fetched.
  __device__ __forceinline__ void arrive() {
    wait_for_copies();
    __syncthreads();
  }

  // Copies the strip's own pixels of row y from stage s to the gradient, once all threads have put them there.
  __device__ __forceinline__ void copy_out(int y, int s) {
    __syncthreads();
    if constexpr (kLayout == Layout::kChannelsLast) {
      copy_run<true>(grad_ + (y * width_ + left_) * channels_, at(y, s, left_, 0), own_ * channels_);
    } else {
      copy_planes<true>(grad_ + y * width_ + left_, at(y, s, left_, 0), own_);
    }
  }

 private:
  static constexpr int kUnit = kBytesOfPiece / static_cast<int>(sizeof(Element));

  // Where row y stands in stage s. A channels_last row keeps its offset from 16 bytes, so that both ends are copied in
  // pieces of 16, unless that is not a whole word, which its pixels begin with.
  __device__ __forceinline__ Element* stage(int y, int s) const {
    unsigned char* begin = memory_ + s * layout_.stage;
    if constexpr (kLayout == Layout::kChannelsLast) {
      const auto offset = reinterpret_cast<uintptr_t>(logits_ + (y * width_ + from_) * channels_) % kBytesOfPiece;
      begin += offset % sizeof(Word<Type>) == 0 ? offset : 0;
    }
    return reinterpret_cast<Element*>(begin);
  }

  // Copies n elements that lie one behind the other, in the largest pieces that are aligned on both sides.
  template <bool kOut>
  static __device__ __forceinline__ void copy_run(Element* global, Element* staged, int n) {
    const auto apart = reinterpret_cast<uintptr_t>(global) - reinterpret_cast<uintptr_t>(staged);
    if (apart % kBytesOfPiece == 0) {
      copy_run_by<kOut, kBytesOfPiece>(global, staged, n);
    } else if (sizeof(Element) == 4 || apart % 4 == 0) {
      copy_run_by<kOut, 4>(global, staged, n);
    } else {
      copy_run_by<kOut, sizeof(Element)>(global, staged, n);
    }
  }

  template <bool kOut, int kBytes>
  static __device__ __forceinline__ void copy_run_by(Element* global, Element* staged, int n) {
    constexpr int kElements = kBytes / static_cast<int>(sizeof(Element));
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(global) / sizeof(Element)) % kElements;
    const int to_boundary = (kElements - misaligned) % kElements;
    const int head = to_boundary < n ? to_boundary : n;
    const int tail = head + (n - head) / kElements * kElements;
    const int self = thread_of_block(), all = threads_of_block();
    // A copy of 2 bytes is a load that has to be waited for: more of them at once.
#pragma unroll kBytes < 4 ? 8 : 4
    for (int i = head + self * kElements; i < tail; i += all * kElements) {
      copy_piece<kOut, kBytes>(global + i, staged + i);
    }
    for (int i = self; i < head; i += all) copy_piece<kOut, sizeof(Element)>(global + i, staged + i);
    for (int i = tail + self; i < n; i += all) copy_piece<kOut, sizeof(Element)>(global + i, staged + i);
  }

  // What a thread copies of a row of planes: it keeps to its column of pieces, and goes down the channels.
  struct Share {
    int piece, columns;  // the first piece, and how many are copied at once
    int first, at_once;  // the same of channels
    int times;           // how often, 0 for a thread that has nothing to copy

    static __device__ __forceinline__ Share of(int pieces, int channels) {
      const int self = thread_of_block(), all = threads_of_block();
      Share share;
      share.columns = pieces < all ? pieces : all;
      share.at_once = all / share.columns;
      share.first = self / share.columns;
      share.piece = self - share.first * share.columns;
      share.times = share.first < share.at_once ? (channels - share.first + share.at_once - 1) / share.at_once : 0;
      return share;
    }
  };

  // Copies n pixels of all channels.
  template <bool kOut>
  __device__ __forceinline__ void copy_planes(Element* global, Element* staged, int n) const {
    const Share& share = kOut ? out_ : in_;
    if (piece_ == kBytesOfPiece) {
      copy_planes_by<kOut, kBytesOfPiece>(global, staged, n, share);
    } else if (piece_ == 4) {
      copy_planes_by<kOut, 4>(global, staged, n, share);
    } else {
      copy_planes_by<kOut, sizeof(Element)>(global, staged, n, share);
    }
  }

  template <bool kOut, int kBytes>
  __device__ __forceinline__ void copy_planes_by(Element* global, Element* staged, int n, const Share& share) const {
    constexpr int kElements = kBytes / static_cast<int>(sizeof(Element));
    const int64_t plane = static_cast<int64_t>(height_) * width_;
    const int pieces = n / kElements;
    for (int piece = share.piece; piece < pieces; piece += share.columns) {
      Element* at = global + piece * kElements + share.first * plane;
      Element* there = staged + piece * kElements + share.first * layout_.pitch;
#pragma unroll 4
      for (int i = 0; i < share.times; ++i) {
        copy_piece<kOut, kBytes>(at, there);
        at += share.at_once * plane;
        there += share.at_once * layout_.pitch;
      }
    }
  }

  template <bool kOut, int kBytes>
  static __device__ __forceinline__ void copy_piece(Element* global, Element* staged) {
    struct alignas(kBytes) Piece {
      unsigned char bytes[kBytes];
    };
    if constexpr (kOut) {
      *reinterpret_cast<Piece*>(global) = *reinterpret_cast<const Piece*>(staged);
    } else if constexpr (kBytes >= 4) {
      copy_async<kBytes>(staged, global);
    } else {
      *staged = *global;
    }
  }

  const StagingMemory layout_;
  unsigned char* memory_;
  int channels_, height_, width_;
  int left_, own_;  // the strip's own pixels
  int from_, to_;   // those that are staged
  int piece_;       // bytes that are copied at a time
  Share in_, out_;
  const Element* logits_;
  Element* grad_;
};

}  // namespace eroseg::cuda
