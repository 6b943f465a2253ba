// One pass over x: each block is read, reduced by a form, and its channels are written.

#pragma once

#include "block.h"
#include "halves.h"
#include "lanes.h"
#include "walk.h"

namespace lean {

template <typename T, typename W, template <typename> class Form>
template <typename Set>
LEAN_INLINE void Pass<T, W, Form>::on() const {
  using L = Lanes<W, Set>;
  for (int64_t index = first; index < last; ++index) {
    const Block<L> block(shape, index, form.rows(shape));
    block.read(x, shape.channels(), scratch);
    for (int64_t vector = 0; vector < block.vectors(); ++vector)
      form.template reduce<L>(shape, scratch + vector * block.apart);
    block.write(scratch + shape.channels() * L::WIDTH, shape.preserved, out);
  }
}

template <typename T, typename W, template <typename> class Form>
void Pass<T, W, Form>::run() const {
  lean::run(*this);
}

}  // namespace lean

#define LEAN_PASSES(FORM)                              \
  template struct lean::Pass<float, float, FORM>;      \
  template struct lean::Pass<double, double, FORM>;    \
  template struct lean::Pass<lean::Half, float, FORM>; \
  template struct lean::Pass<lean::Brain, float, FORM>;
