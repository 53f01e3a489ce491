// Rows of logits in shared memory: fetched there while another row is at work, and copied out as their gradient.
//
// Every thread of a block copies pieces of 16 bytes, whichever pixels these belong to. A stage holds one row of the
// block's strip and its halo.
//
// Invariants: all threads of a block call fetch, arrive and copy_out together. arrive has a barrier: a stage that is
// fetched after it has been used by nobody since.
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

// The shared memory of Staging, and what the host computes for its copies.
struct StagingMemory {
  int pitch = 0;  // pixels of a staged row of a plane
  int gap = 0;    // elements left free behind each word of channels_last pixels
  int stage = 0;  // bytes of a staged row
  int stages = 0;
  int columns = 0;  // pieces of a plane's row that the block copies at once
  Divisor by_columns;
  uint32_t run_of_element = 0;  // 2^32 / the elements of a word of channels_last pixels

  int64_t bytes() const { return static_cast<int64_t>(stages) * stage; }

  // `words_of_share` are the words of a thread's share (share.cuh).
  template <class Type, Layout kLayout>
  static StagingMemory of(const Input& input, const Strips& strips, int words_of_share, int stages) {
    constexpr int kElement = sizeof(typename Type::Element), kUnit = kBytesOfPiece / kElement;
    const int channels = static_cast<int>(input.shape.channels);
    const int pixels = strips.width + (strips.halo > 0 ? 2 * kUnit : 0);
    StagingMemory memory;
    memory.stages = stages;
    int elements;
    if constexpr (kLayout == Layout::kChannelsLast) {
      memory.gap = channels % 4 == 0 ? kUnit : 0;
      // A row begins anywhere within 16 bytes.
      elements = pixels * channels + pixels / Word<Type>::kElements * memory.gap + kUnit;
      memory.run_of_element = static_cast<uint32_t>((uint64_t{1} << 32) / (Word<Type>::kElements * channels)) + 1;
    } else {
      memory.pitch = pitch_of_planes<kLayout>(input.shape.pixels(), pixels, kElement, words_of_share, strips.groups);
      // Unaligned, the first row begins anywhere within 16 bytes.
      elements = memory.pitch * channels + (kLayout == Layout::kUnalignedPlanes ? kUnit : 0);
      memory.columns = std::min(pixels / kUnit + (kLayout == Layout::kUnalignedPlanes ? 1 : 0), strips.threads());
      memory.by_columns = Divisor::of(memory.columns);
    }
    memory.stage = (elements + kUnit - 1) / kUnit * kBytesOfPiece;
    return memory;
  }

 private:
  // Half a warp reads a word each in one go if they are of different banks, of which there are 128 bytes: with 2, 4 or
  // 8 threads for a word of pixels, 8, 4 or 2 neighbouring words of as many planes, which are a thread's share of
  // planes apart. So that distance should be 64, 32 or 16 bytes times an odd number, which it can be, up to what is
  // left of 16 bytes, since a share is an odd number of planes.
  //
  // Unaligned planes keep their distance modulo 16 bytes: all rows then lie in a stage as in memory, modulo 16 bytes.
  template <Layout kLayout>
  static int pitch_of_planes(int64_t plane, int pixels, int element, int words_of_share, int groups) {
    const int unit = kBytesOfPiece / element;
    int pitch = pixels;
    if constexpr (kLayout == Layout::kUnalignedPlanes) {
      pitch += unit - 1;  // or the pieces of one row would reach into the next
      while (pitch % unit != plane % unit) ++pitch;
    }
    const auto off = [&](int candidate) {
      const int wanted = 128 / groups, period = 2 * wanted;
      const int distance = words_of_share * candidate * element % period;
      return std::abs(distance - wanted);
    };
    int best = pitch;
    for (int candidate = pitch; groups > 1 && candidate < pitch + 8 * unit; candidate += unit) {
      if (off(candidate) < off(best)) best = candidate;
    }
    return best;
  }
};

// How a launch of a kernel over rows is laid out: its blocks, their shared memory, and the words of pixels' logits that
// each but the last of the threads of a word of pixels has (share.cuh). Where several threads share them, this is odd.
struct RowsPlan {
  Strips strips;
  StagingMemory memory;
  int words_of_share = 0;
  Divisor by_words_of_share;
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
    const int halo = plan.strips.halo > 0 ? kUnit : 0;
    from_ = place.left - halo < 0 ? 0 : place.left - halo;
    to_ = place.left + place.width + halo < width_ ? place.left + place.width + halo : width_;
    const int64_t offset = place.image * channels_ * height_ * width_;
    logits_ = static_cast<const Element*>(input.logits.data) + offset;
    grad_ = grad == nullptr ? nullptr : static_cast<Element*>(grad) + offset;
    if constexpr (kLayout != Layout::kChannelsLast) {
      const int self = thread_of_block(), channel = layout_.by_columns.quotient(self);
      piece_ = self - channel * layout_.columns;
      at_once_ = layout_.by_columns.quotient(threads_of_block());
      first_channel_ = channel < at_once_ ? channel : channels_;
      // Whole pieces are copied from where the tensors begin at one; a caller's own may begin elsewhere.
      const uintptr_t tensors = reinterpret_cast<uintptr_t>(input.logits.data) | reinterpret_cast<uintptr_t>(grad);
      by_pieces_ = kLayout == Layout::kPlanes || tensors % kBytesOfPiece == 0;
    }
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

  static __device__ __forceinline__ int misalignment(const Element* at) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(at) % kBytesOfPiece) / static_cast<int>(sizeof(Element));
  }

  // Where row y stands in stage s. Rows of unaligned planes keep their offset from 16 bytes. A channels_last row does,
  // so that both ends are copied in pieces of 16, unless that is not a whole word, which its pixels begin with, or
  // there are gaps, which pieces end at.
  __device__ __forceinline__ Element* stage(int y, int s) const {
    auto* begin = reinterpret_cast<Element*>(memory_ + s * layout_.stage);
    if constexpr (kLayout == Layout::kUnalignedPlanes) begin += misalignment(logits_ + y * width_ + from_);
    if constexpr (kLayout == Layout::kChannelsLast) {
      const int offset = misalignment(logits_ + (y * width_ + from_) * channels_);
      begin += offset % kPixels == 0 && layout_.gap == 0 ? offset : 0;
    }
    return begin;
  }

  // Copies n elements of pixels that lie one behind the other, in the largest pieces that are aligned on both sides.
  template <bool kOut>
  __device__ __forceinline__ void copy_pixels(Element* global, Element* staged, int n) const {
    const auto apart = reinterpret_cast<uintptr_t>(global) - reinterpret_cast<uintptr_t>(staged);
    const auto there = [&](int i) { return staged + i; };
    // As many gaps as words of pixels lie before an element: a division by a multiplication, exact for fewer than 2^32
    // elements times elements of a word of pixels.
    const auto with_gaps = [&](int i) {
      return staged + i + static_cast<int>(static_cast<uint64_t>(i) * layout_.run_of_element >> 32) * layout_.gap;
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

  // Copies n pixels of all channels. A thread keeps to its column of pieces and goes down the channels.
  template <bool kOut>
  __device__ __forceinline__ void copy_planes(Element* global, Element* staged, int n) const {
    const int plane = height_ * width_;
    if (kLayout == Layout::kUnalignedPlanes && !by_pieces_) {
      copy_elements<kOut>(global, staged, n, plane);
      return;
    }
    for (int piece = piece_; piece * kUnit < n + (kLayout == Layout::kPlanes ? 0 : kUnit - 1);
         piece += layout_.columns) {
#pragma unroll 4
      for (int channel = first_channel_; channel < channels_; channel += at_once_) {
        Element* const row = global + static_cast<int64_t>(channel) * plane;
        Element* const staged_row = staged + channel * layout_.pitch;
        if constexpr (kLayout == Layout::kPlanes) {
          copy_piece<kOut, kBytesOfPiece>(row + piece * kUnit, staged_row + piece * kUnit);
        } else {
          const int begin = piece * kUnit - misalignment(row);
          if constexpr (kOut) {
            if (begin >= 0 && begin + kUnit <= n) copy_piece<true, kBytesOfPiece>(row + begin, staged_row + begin);
          } else if (begin < n) {
            // The piece may begin before the row, in memory of the tensor, but is not read beyond its end.
            copy_async_some(staged_row + begin, row + begin, (n - begin) * static_cast<int>(sizeof(Element)));
          }
        }
      }
    }
    if constexpr (kOut && kLayout == Layout::kUnalignedPlanes) copy_edges(global, staged, n, plane);
  }

  // Copies to the gradient what of each row is no whole piece: others write the rest of such pieces.
  __device__ __forceinline__ void copy_edges(Element* global, Element* staged, int n, int plane) const {
    for (int i = thread_of_block(); i < channels_ * 2 * kUnit; i += threads_of_block()) {
      const int channel = i / (2 * kUnit), k = i % (2 * kUnit);
      Element* const row = global + static_cast<int64_t>(channel) * plane;
      const int before = misalignment(row), head = min((kUnit - before) % kUnit, n);
      const int tail = max(n - (before + n) % kUnit, head);
      const int at = k < kUnit ? k : tail + k - kUnit;
      if (at < (k < kUnit ? head : n)) row[at] = staged[channel * layout_.pitch + at];
    }
  }

  // For tensors that begin anywhere.
  template <bool kOut>
  __device__ __forceinline__ void copy_elements(Element* global, Element* staged, int n, int plane) const {
#pragma unroll 1
    for (int channel = 0; channel < channels_; ++channel) {
#pragma unroll 1
      for (int i = thread_of_block(); i < n; i += threads_of_block()) {
        copy_piece<kOut, sizeof(Element)>(global + static_cast<int64_t>(channel) * plane + i,
                                          staged + channel * layout_.pitch + i);
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

  const StagingMemory& layout_;
  unsigned char* memory_;
  int channels_, height_, width_;
  int left_, own_;                                   // the strip's own pixels
  int from_, to_;                                    // those that are staged
  int piece_ = 0, first_channel_ = 0, at_once_ = 0;  // what the thread copies of planes
  bool by_pieces_ = true;
  const Element* logits_;
  Element* grad_;
};

}  // namespace eroseg::cuda
