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
//
// In channels_last, neighbouring words of pixels are as many words apart as there are classes: if these are a multiple
// of 4, 16 bytes are left free behind each word's pixels.
struct StagingMemory {
  int pitch;  // pixels of a staged row
  int gap;    // elements left free behind each word of pixels
  int stage;  // bytes of a staged row
  int stages;

  template <class Type>
  static __host__ __device__ StagingMemory of(const Input& input, const Strips& strips, int stages) {
    const int unit = kBytesOfPiece / static_cast<int>(sizeof(typename Type::Element));
    int units = strips.width / unit + (strips.halo > 0 ? 2 : 0);
    if (!input.logits.channels_last && strips.groups > 1) {
      while (units % (16 / strips.groups) != 8 / strips.groups) ++units;
    }
    const int pitch = units * unit, channels = static_cast<int>(input.shape.channels);
    const int gap = input.logits.channels_last && channels % 4 == 0 ? unit : 0;
    const int elements = pitch * channels + pitch / Word<Type>::kElements * gap;
    // A channels_last row begins anywhere within 16 bytes.
    const int offset = input.logits.channels_last ? kBytesOfPiece : 0;
    return {pitch, gap, elements * static_cast<int>(sizeof(typename Type::Element)) + offset, stages};
  }

  __host__ __device__ int64_t bytes() const { return static_cast<int64_t>(stages) * stage; }
};

template <class Type, Layout kLayout>
class Staging {
 public:
  using Element = typename Type::Element;

  // `memory` has StagingMemory's bytes and is aligned to 16 of them; `grad` is like the logits, or null if nothing
  // is copied out.
  __device__ __forceinline__ Staging(const Input& input, void* grad, const Strips& strips, const Place& place,
                                     int stages, unsigned char* memory)
      : layout_(StagingMemory::of<Type>(input, strips, stages)),
        memory_(memory),
        channels_(static_cast<int>(input.shape.channels)),
        height_(static_cast<int>(input.shape.height)),
        width_(static_cast<int>(input.shape.width)),
        left_(place.left),
        own_(place.width),
        run_of_element_(static_cast<unsigned>((1ull << 32) / (kPixels * channels_)) + 1) {
    const int halo = strips.halo > 0 ? kUnit : 0;
    from_ = place.left - halo < 0 ? 0 : place.left - halo;
    to_ = place.left + place.width + halo < width_ ? place.left + place.width + halo : width_;
    const int64_t offset = place.image * channels_ * height_ * width_;
    logits_ = static_cast<const Element*>(input.logits.data) + offset;
    grad_ = grad == nullptr ? nullptr : static_cast<Element*>(grad) + offset;
    const uintptr_t all = reinterpret_cast<uintptr_t>(logits_) | reinterpret_cast<uintptr_t>(grad_) |
                          static_cast<uintptr_t>(width_ * static_cast<int>(sizeof(Element)));
    piece_ = all % kBytesOfPiece == 0 ? kBytesOfPiece : (all % 4 == 0 ? 4 : static_cast<int>(sizeof(Element)));
    const int of_piece = piece_ / static_cast<int>(sizeof(Element));
    in_ = Part::of((to_ - from_) / of_piece, channels_);
    out_ = Part::of(own_ / of_piece, channels_);
  }

  // The image's row y in stage s from a pixel on, the first of a word.
  __device__ __forceinline__ Element* at(int y, int s, int pixel) const {
    const int gaps = kLayout == Layout::kChannelsLast ? (pixel - from_) / kPixels * layout_.gap : 0;
    return stage(y, s) + offset_of(pixel - from_, 0) + gaps;
  }

  // From a pixel to another one of its word and from a channel to another one, in elements.
  __device__ __forceinline__ int offset_of(int pixel, int channel) const {
    return kLayout == Layout::kChannelsLast ? pixel * channels_ + channel : channel * layout_.pitch + pixel;
  }

  // Begins to fetch row y of the image, if there is one, to stage s.
  __device__ __forceinline__ void fetch(int y, int s) {
    if (y < 0 || y >= height_) return;
    if constexpr (kLayout == Layout::kChannelsLast) {
      const Element* row = logits_ + (y * width_ + from_) * channels_;
      copy_pixels<false>(const_cast<Element*>(row), stage(y, s), (to_ - from_) * channels_);
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
      copy_pixels<true>(grad_ + (y * width_ + left_) * channels_, at(y, s, left_), own_ * channels_);
    } else {
      copy_planes<true>(grad_ + y * width_ + left_, at(y, s, left_), own_);
    }
  }

 private:
  static constexpr int kPixels = Word<Type>::kElements;
  static constexpr int kUnit = kBytesOfPiece / static_cast<int>(sizeof(Element));

  // Where row y stands in stage s. A channels_last row keeps its offset from 16 bytes, so that both ends are copied in
  // pieces of 16, unless that is not a whole word, which its pixels begin with, or there are gaps, which pieces end at.
  __device__ __forceinline__ Element* stage(int y, int s) const {
    unsigned char* begin = memory_ + s * layout_.stage;
    if constexpr (kLayout == Layout::kChannelsLast) {
      const auto offset = reinterpret_cast<uintptr_t>(logits_ + (y * width_ + from_) * channels_) % kBytesOfPiece;
      begin += offset % sizeof(Word<Type>) == 0 && layout_.gap == 0 ? offset : 0;
    }
    return reinterpret_cast<Element*>(begin);
  }

  // Copies n elements of pixels that lie one behind the other, in the largest pieces that are aligned on both sides.
  template <bool kOut>
  __device__ __forceinline__ void copy_pixels(Element* global, Element* staged, int n) const {
    const auto apart = reinterpret_cast<uintptr_t>(global) - reinterpret_cast<uintptr_t>(staged);
    const auto there = [&](int i) { return staged + i; };
    // As many gaps as words of pixels lie before an element: a division by a multiplication, exact for fewer than 2^32
    // elements times elements of a word of pixels.
    const auto with_gaps = [&](int i) {
      return staged + i + static_cast<int>(static_cast<uint64_t>(i) * run_of_element_ >> 32) * layout_.gap;
    };
    if (apart % kBytesOfPiece == 0 && layout_.gap == 0) {
      copy_pixels_by<kOut, kBytesOfPiece>(global, there, n);
    } else if (apart % kBytesOfPiece == 0) {
      copy_pixels_by<kOut, kBytesOfPiece>(global, with_gaps, n);
    } else if (sizeof(Element) == 4 || apart % 4 == 0) {
      copy_pixels_by<kOut, 4>(global, with_gaps, n);
    } else if constexpr (sizeof(Element) == 2) {
      copy_pixels_by<kOut, 4, true>(global, with_gaps, n);
    }
  }

  // staged(i) is where element i stands. With kSplit, pieces are aligned in global memory only.
  template <bool kOut, int kBytes, bool kSplit = false, class Staged>
  static __device__ __forceinline__ void copy_pixels_by(Element* global, const Staged& staged, int n) {
    constexpr int kElements = kBytes / static_cast<int>(sizeof(Element));
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(global) / sizeof(Element)) % kElements;
    const int to_boundary = (kElements - misaligned) % kElements;
    const int head = to_boundary < n ? to_boundary : n;
    const int tail = head + (n - head) / kElements * kElements;
    const int self = thread_of_block(), all = threads_of_block();
#pragma unroll 4
    for (int i = head + self * kElements; i < tail; i += all * kElements) {
      if constexpr (kSplit) {
        copy_split<kOut>(global + i, staged(i), staged(i + 1));
      } else {
        copy_piece<kOut, kBytes>(global + i, staged(i));
      }
    }
#pragma unroll 1
    for (int i = self; i < head; i += all) copy_piece<kOut, sizeof(Element)>(global + i, staged(i));
#pragma unroll 1
    for (int i = tail + self; i < n; i += all) copy_piece<kOut, sizeof(Element)>(global + i, staged(i));
  }

  // Copies two elements of 16 bits that make 4 aligned bytes in global memory.
  template <bool kOut>
  static __device__ __forceinline__ void copy_split(Element* global, Element* first, Element* second) {
    if constexpr (kOut) {
      *reinterpret_cast<uint32_t*>(global) = static_cast<uint32_t>(*first) | static_cast<uint32_t>(*second) << 16;
    } else {
      const auto both = *reinterpret_cast<const uint32_t*>(global);
      *first = static_cast<Element>(both);
      *second = static_cast<Element>(both >> 16);
    }
  }

  // What a thread copies of a row of planes: it keeps to its column of pieces, and goes down the channels.
  struct Part {
    int piece, columns;  // the first piece, and how many are copied at once
    int first, at_once;  // the same of channels
    int times;           // how often, 0 for a thread that has nothing to copy

    static __device__ __forceinline__ Part of(int pieces, int channels) {
      const int self = thread_of_block(), all = threads_of_block();
      Part part;
      part.columns = pieces < all ? pieces : all;
      part.at_once = all / part.columns;
      part.first = self / part.columns;
      part.piece = self - part.first * part.columns;
      part.times = part.first < part.at_once ? (channels - part.first + part.at_once - 1) / part.at_once : 0;
      return part;
    }
  };

  // Copies n pixels of all channels.
  template <bool kOut>
  __device__ __forceinline__ void copy_planes(Element* global, Element* staged, int n) const {
    const Part& part = kOut ? out_ : in_;
    if (piece_ == kBytesOfPiece) {
      copy_planes_by<kOut, kBytesOfPiece>(global, staged, n, part);
    } else if (piece_ == 4) {
      copy_planes_by<kOut, 4>(global, staged, n, part);
    } else {
      copy_planes_by<kOut, sizeof(Element)>(global, staged, n, part);
    }
  }

  template <bool kOut, int kBytes>
  __device__ __forceinline__ void copy_planes_by(Element* global, Element* staged, int n, const Part& part) const {
    constexpr int kElements = kBytes / static_cast<int>(sizeof(Element));
    const int64_t plane = static_cast<int64_t>(height_) * width_;
    const int pieces = n / kElements;
    for (int piece = part.piece; piece < pieces; piece += part.columns) {
      Element* at = global + piece * kElements + part.first * plane;
      Element* there = staged + piece * kElements + part.first * layout_.pitch;
#pragma unroll 4
      for (int i = 0; i < part.times; ++i) {
        copy_piece<kOut, kBytes>(at, there);
        at += part.at_once * plane;
        there += part.at_once * layout_.pitch;
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
  Part in_, out_;
  unsigned run_of_element_;  // 2^32 / the elements of a word of pixels
  const Element* logits_;
  Element* grad_;
};

}  // namespace eroseg::cuda
