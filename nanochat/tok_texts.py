"""Five short texts of different kinds on which scripts.tok_eval measures compression. Written for this repository."""

NEWS = """\
The harbour town of Westry voted on Tuesday to keep its ferry, ending a dispute that had divided the council for \
most of the year. Supporters filled the gallery well before the session opened at seven, and many stayed until the \
count was read out shortly after eleven: nine votes in favour, six against, and one abstention.

The crossing, which carries about 1,400 passengers on a weekday and twice that in August, has lost money since the \
new bridge opened in 2019. The operator said in March that it could not continue without a subsidy of £380,000 a \
year. "Nobody here believes a ferry should make a profit," said Councillor Hana Whitlock, who led the campaign. "We \
don't ask the library to make one either."

Opponents argued that the money would be better spent on the coastal road, parts of which were closed for eleven \
days after the January storms. "It's a beautiful boat, and I've used it all my life," said Martin Oyelaran, whose \
amendment to phase the service out by 2030 was rejected. "But we can't pay for everything, and people are going to \
notice when their street isn't repaired."

Under the agreement, fares will rise by 6 percent in April, children under twelve will travel free, and the last \
departure moves from 9:45 to 10:30 p.m. so that hospital staff finishing the evening shift can get home. A review is \
due in three years. By midnight someone had already tied a hand-painted banner to the railings of the pier; it read, \
in letters a foot high, "See you on board."
"""

CODE = '''\
"""A small cache that forgets what was used longest ago."""

from collections import OrderedDict
from collections.abc import Callable, Hashable


class RecentCache:
    """Keeps at most `capacity` values; reading a value makes it recent again."""

    def __init__(self, capacity: int = 128):
        if capacity < 1:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self.capacity = capacity
        self.hits = self.misses = 0
        self._values: OrderedDict[Hashable, object] = OrderedDict()

    def __len__(self):
        return len(self._values)

    def get(self, key, compute: Callable[[], object]):
        if key in self._values:
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key]
        self.misses += 1
        value = self._values[key] = compute()
        while len(self._values) > self.capacity:
            self._values.popitem(last=False)  # the oldest entry stands first
        return value


def count_paths(rows, cols, blocked=frozenset()):
    """Paths from the top left to the bottom right cell, moving right or down."""
    table = [[0] * cols for _ in range(rows)]
    for i in range(rows):
        for j in range(cols):
            if (i, j) in blocked:
                continue
            if i == 0 and j == 0:
                table[i][j] = 1
            else:
                above = table[i - 1][j] if i > 0 else 0
                left = table[i][j - 1] if j > 0 else 0
                table[i][j] = above + left
    return table[-1][-1]


if __name__ == "__main__":
    cache = RecentCache(capacity=4)
    for n in [2, 3, 2, 5, 8, 3, 2]:
        print(n, cache.get(n, lambda n=n: count_paths(n, n)), cache.hits / (cache.hits + cache.misses))
'''

MATHS = r"""
\section{A sum over odd squares}

\begin{lemma}
For every integer $n \ge 1$ we have $\sum_{k=1}^{n} (2k-1)^2 = \frac{n(2n-1)(2n+1)}{3}$.
\end{lemma}

\begin{proof}
We argue by induction on $n$. For $n = 1$ both sides equal $1$. Suppose that the formula holds for some $n$. Adding
$(2n+1)^2$ to both sides and taking out the common factor gives
\begin{align}
  \sum_{k=1}^{n+1} (2k-1)^2
    &= \frac{n(2n-1)(2n+1)}{3} + (2n+1)^2 \\
    &= \frac{(2n+1)\left(2n^2 + 5n + 3\right)}{3}
     = \frac{(n+1)(2n+1)(2n+3)}{3},
\end{align}
which is the formula with $n+1$ in place of $n$.
\end{proof}

Dividing by $n^3$ and letting $n \to \infty$ we find $\lim_{n} n^{-3} \sum_{k \le n} (2k-1)^2 = \tfrac{4}{3}$. This is
no accident: the left side is a Riemann sum, with midpoints $x_k = \frac{2k-1}{2n}$, of the integral
\[
  4 \int_0^1 x^2 \, dx = \frac{4}{3}.
\]
More generally, let $f \colon [0,1] \to \mathbb{R}$ be twice differentiable with $|f''(x)| \le M$. Then the midpoint
rule satisfies
\[
  \left| \int_0^1 f(x)\,dx - \frac{1}{n} \sum_{k=1}^{n} f\!\left(\frac{2k-1}{2n}\right) \right| \le \frac{M}{24 n^2},
\]
so that for $f(x) = x^2$, where $M = 2$, the error is at most $\frac{1}{12 n^2}$; by the lemma it is exactly that.
"""

SCIENCE = """\
Why does a wet stone look darker than a dry one? The stone has not changed; the path of the light has. A dry surface \
is rough on the scale of micrometres, and light that strikes it is scattered back at once from countless tiny facets, \
a good part of it never entering the mineral grains at all. A film of water fills the gaps between these facets. \
Because the refractive index of water (about 1.33) lies between that of air (1.00) and that of quartz (1.54), each \
boundary now reflects less: at normal incidence the share falls from roughly 4.5 % to 0.5 %. More light enters the \
stone, and more of it is absorbed there.

A second effect works in the same direction. Light that has been scattered inside the wet layer must leave it again, \
and beyond the critical angle of about 48.8° it cannot: it is reflected at the water's upper surface, returns to the \
stone, and gets another chance of being absorbed. On sand, to take an example, the reflectance in visible light may \
drop from 0.35 to 0.20 on wetting, while the wavelength dependence, that is, the hue, stays nearly constant.

The same reasoning explains why oiled paper turns translucent, why a scratched lens clears under a drop of glycerol, \
and why some marine animals with tissue of nearly uniform refractive index are almost invisible. Where the index does \
not change, nothing is scattered; and what does not scatter, we cannot see.
"""

KOREAN = """\
비가 그친 아침, 할머니는 마당 한쪽에 있는 작은 텃밭으로 나가셨다. 상추 잎에는 물방울이 맺혀 있었고, 고추는 어제보다 \
조금 더 붉어진 것처럼 보였다. 나는 장화를 신고 할머니 뒤를 따라갔다. "올해는 비가 많이 와서 걱정했는데, 그래도 잘 \
자랐구나." 할머니는 호박 하나를 따서 나에게 건네주셨다. 생각보다 무거워서 두 손으로 안아야 했다.

우리 동네에는 오래된 시장이 있다. 매달 5일과 10일이 되면 상인들이 아침 일찍부터 나와 채소와 과일, 생선과 떡을 판다. \
요즘은 인터넷으로 물건을 사는 사람이 많아졌지만, 할머니는 여전히 시장에 가는 것을 좋아하신다. 물건값을 깎는 재미도 \
있고, 아는 사람을 만나 이야기를 나눌 수도 있기 때문이다. 지난번에는 버스를 기다리다가 초등학교 친구를 40년 만에 \
만나셨다고 한다.

저녁에는 온 가족이 모여 호박죽을 끓여 먹었다. 아버지는 조금 달다고 하셨고, 동생은 두 그릇이나 먹었다. 창밖에서는 \
다시 빗소리가 들리기 시작했다. 나는 문득 이런 평범한 하루가 나중에는 가장 그리운 기억이 될지도 모른다고 생각했다.
"""

TEXTS = {"news": NEWS, "code": CODE, "maths": MATHS, "science": SCIENCE, "korean": KOREAN}
