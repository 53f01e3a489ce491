// The tile of a block, and a thread's part of it.
#pragma once

#include "../params.h"
#include "tiles.h"
#include "types.cuh"

namespace eroseg::cuda {

struct ThreadTile {
  int64_t image;
  int begin, end;   // rows of the tile
  bool upward;      // whether the block goes from the last of them to the first
  int left, width;  // pixels of the tile's rows
  int x;            // first pixel of this thread's vector
  int pixels;       // of the vector that lie in the image and in the tile or its halo
  int slot;         // of the thread in the row
  bool own;         // whether the vector belongs to the tile, not to its halo
  int64_t in_map;   // index of the vector in row 0 of the image, in a map [B, H, W]
  int image_width;
  int group;         // which of the threads with the same pixels, which are neighbours in a warp
  int first, count;  // the group's slice of the classes; empty for a thread without pixels

  // Of two tiles, one below the other, one is gone over upwards and the other downwards: both read the rows at their
  // border at about the same time, so that these come from memory once.
  template <class Type>
  static __device__ __forceinline__ ThreadTile of(const Shape& shape, const Tiles& tiles, int slice_classes) {
    constexpr int kPixels = Vector<Type>::kElements;
    ThreadTile tile;
    const int block = static_cast<int>(blockIdx.x), blocks_of_image = tiles.across * tiles.down;
    const int column = block % blocks_of_image / tiles.down, row = block % tiles.down;
    tile.image = block / blocks_of_image;
    const int height = static_cast<int>(shape.height), image_width = static_cast<int>(shape.width);
    tile.image_width = image_width;
    tile.begin = row * tiles.rows;
    tile.end = tile.begin + tiles.rows < height ? tile.begin + tiles.rows : height;
    tile.upward = row % 2 != 0;
    tile.left = column * tiles.width;
    tile.width = tile.left + tiles.width < image_width ? tiles.width : image_width - tile.left;

    // The tile's own vectors come first, then the halo on the left, then the one on the right.
    tile.slot = static_cast<int>(threadIdx.y);
    const int own_vectors = tiles.width / kPixels, halo_vectors = tiles.halo / kPixels;
    const int beyond = tile.slot - own_vectors;
    tile.own = beyond < 0;
    tile.x = tile.left + tile.slot * kPixels;
    if (beyond >= 0 && beyond < halo_vectors) tile.x = tile.left - tiles.halo + beyond * kPixels;
    if (beyond >= halo_vectors) tile.x -= tiles.halo;
    tile.in_map = tile.image * shape.pixels() + tile.x;
    const bool some = beyond < 2 * halo_vectors && tile.x >= 0 && tile.x < image_width;
    tile.pixels = !some ? 0 : (image_width - tile.x < kPixels ? image_width - tile.x : kPixels);

    tile.group = static_cast<int>(threadIdx.x);
    const int classes = static_cast<int>(shape.classes());
    tile.first = tile.group * slice_classes;
    const int count = classes - tile.first < slice_classes ? classes - tile.first : slice_classes;
    tile.count = tile.pixels > 0 && count > 0 ? count : 0;
    return tile;
  }

  // The vector's index in row y of the image, in a map [B, H, W]. Offsets inside an image are of 32 bits.
  __device__ __forceinline__ int64_t index(int y) const { return in_map + y * image_width; }

  // The row of the image that the block takes as the tile's i-th; -1 and end - begin are the rows beyond the tile.
  __device__ __forceinline__ int row(int i) const { return upward ? end - 1 - i : begin + i; }
};

}  // namespace eroseg::cuda
