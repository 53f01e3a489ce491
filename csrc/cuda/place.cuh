// Where a thread of a block over rows of an image stands.
#pragma once

#include "../jobs.h"
#include "strips.h"
#include "types.cuh"

namespace eroseg::cuda {

// What a block works on, and a thread's part of it.
struct Place {
  int64_t image;
  int begin, end;   // own rows
  bool upward;      // whether the block goes from the last of them to the first
  int left, width;  // own pixels of the strip
  int x;            // first pixel of this thread's word
  int pixels;       // of the word that lie in the image and in the strip or its halo
  int slot;         // of the thread in the row
  bool own;         // whether the word belongs to the strip, not to its halo
  int64_t in_map;   // the word's place in row 0 of the image, in a map [B, H, W]
  int image_width;
  int group;         // which of the threads with the same pixels, which are neighbours in a warp
  int first, count;  // the group's share of as many words as there are classes; none for a thread without pixels

  // Of two bands that touch, one is gone over upwards and the other downwards: the rows that both of them read are read
  // at about the same time, and so once from memory.
  template <class Type>
  static __device__ __forceinline__ Place of(const Shape& shape, const Strips& strips, int words_of_share) {
    constexpr int kPixels = Word<Type>::kElements;
    Place place;
    const int block = static_cast<int>(blockIdx.x), blocks_of_image = strips.count * strips.bands;
    const int strip = block % blocks_of_image / strips.bands, band = block % strips.bands;
    place.image = block / blocks_of_image;
    const int height = static_cast<int>(shape.height), image_width = static_cast<int>(shape.width);
    place.image_width = image_width;
    place.begin = band * strips.rows;
    place.end = place.begin + strips.rows < height ? place.begin + strips.rows : height;
    place.upward = band % 2 != 0;
    place.left = strip * strips.width;
    place.width = place.left + strips.width < image_width ? strips.width : image_width - place.left;

    // Own words first, then the halo on the left, then the one on the right.
    place.slot = static_cast<int>(threadIdx.y);
    const int own_words = strips.width / kPixels, halo_words = strips.halo / kPixels;
    const int beyond = place.slot - own_words;
    place.own = beyond < 0;
    place.x = place.left + place.slot * kPixels;
    if (beyond >= 0 && beyond < halo_words) place.x = place.left - strips.halo + beyond * kPixels;
    if (beyond >= halo_words) place.x -= strips.halo;
    place.in_map = place.image * shape.pixels() + place.x;
    const bool some = beyond < 2 * halo_words && place.x >= 0 && place.x < image_width;
    place.pixels = !some ? 0 : (image_width - place.x < kPixels ? image_width - place.x : kPixels);

    place.group = static_cast<int>(threadIdx.x);
    const int classes = static_cast<int>(shape.classes());
    place.first = place.group * words_of_share;
    const int count = classes - place.first < words_of_share ? classes - place.first : words_of_share;
    place.count = place.pixels > 0 && count > 0 ? count : 0;
    return place;
  }

  // The word's place in row y of the image, in a map [B, H, W]. Offsets inside an image are of 32 bits.
  __device__ __forceinline__ int64_t index(int y) const { return in_map + y * image_width; }

  // The row of the image that is number i of the band, which begins with 0; -1 and end - begin are those beyond it.
  __device__ __forceinline__ int row(int i) const { return upward ? end - 1 - i : begin + i; }
};

}  // namespace eroseg::cuda
