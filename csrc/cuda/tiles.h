// How an image batch is cut into the blocks of a launch.
//
// An image is cut into tiles, `across` of them side by side and `down` below each other; a block goes over the rows of
// one tile. A row of a tile is a vector of neighbouring pixels for each of `slots` sets of `groups` threads, among
// which the classes are divided. A block also reduces `halo` pixels on either side of its tile and `radius` rows above
// and below it; the blocks of the neighbouring tiles write their gradient.
#pragma once

#include <algorithm>
#include <cstdint>

namespace eroseg::cuda {

struct Tiles {
  int across = 0;  // tiles side by side
  int width = 0;   // pixels of a tile's row, whole units
  int halo = 0;    // pixels on either side of a row, whole vectors; 0 if tiles are as wide as the image
  int slots = 0;   // threads that share a row
  int groups = 0;  // threads that a pixel's classes are divided among
  int down = 0;    // tiles below each other
  int rows = 0;    // of a tile

  int threads() const { return slots * groups; }
  int64_t blocks_of_image() const { return static_cast<int64_t>(across) * down; }
};

// Pixels of a tile's row, other than the last tile's, and tiles below each other: they bound the blocks of an image,
// and so the memory for their counts.
constexpr int kNarrowestTile = 16;
constexpr int64_t kMostTilesDown = 256;

// Calls f(tiles) for every width that tiles may have, from wide to narrow ones; cut_rows decides about their rows.
// Tiles begin at whole units of two vectors, and a block has whole warps.
template <class F>
void for_each_cut(int64_t width, int radius, int pixels_of_vector, int groups, int most_threads, const F& f) {
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
  const int64_t unit = 2 * pixels_of_vector, slots_of_warp = 32 / groups;
  const int64_t total = std::max<int64_t>(up(width, unit), 1);
  int64_t last_own = 0;
  for (int64_t across = 1; across <= total; ++across) {
    const int64_t own = up(total, across);
    if (across > 1 && own * unit < kNarrowestTile) break;
    if (own == last_own) continue;
    last_own = own;
    const int64_t halo = across == 1 ? 0 : up(radius, pixels_of_vector);
    const int64_t slots = up(2 * (own + halo), slots_of_warp) * slots_of_warp;
    if (slots * groups > most_threads) continue;
    Tiles tiles;
    tiles.across = static_cast<int>(up(total, own));
    tiles.width = static_cast<int>(own * unit);
    tiles.halo = static_cast<int>(halo * pixels_of_vector);
    tiles.slots = static_cast<int>(slots);
    tiles.groups = groups;
    f(tiles);
    if (slots == slots_of_warp) break;  // narrower tiles have as many threads, and there are more of them
  }
}

// Gives tiles as many rows as make the launch end soonest, and returns how long it takes then.
// `resident` blocks fit a multiprocessor, of which there are `processors`; row_time(n) is how long n blocks on one of
// them take for a row each. A block also reduces `radius` rows on either side, and takes one row's time to fill its
// pipeline.
template <class RowTime>
double cut_rows(Tiles& tiles, int64_t batch, int64_t height, int radius, int64_t processors, int64_t resident,
                const RowTime& row_time) {
  double least = 0;
  for (int64_t down = 1; down <= std::min(height, kMostTilesDown); ++down) {
    const int64_t rows = (height + down - 1) / down;
    const int64_t blocks = batch * tiles.across * ((height + rows - 1) / rows);
    const int64_t waves = blocks / (processors * resident), rest = blocks % (processors * resident);
    const double rows_of_all = static_cast<double>(waves) * row_time(resident) +
                               (rest > 0 ? row_time((rest + processors - 1) / processors) : 0.0);
    const double time = static_cast<double>(rows + 2 * radius + 1) * rows_of_all;
    if (tiles.rows == 0 || time < least) {
      least = time;
      tiles.rows = static_cast<int>(rows);
      tiles.down = static_cast<int>((height + rows - 1) / rows);
    }
  }
  return least;
}

}  // namespace eroseg::cuda
