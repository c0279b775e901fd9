"""How each method is drawn, in every figure."""

from typing import NamedTuple

Marker = str | tuple[int, int, int]  # as matplotlib takes it: a letter, or corners, star and angle


class Look(NamedTuple):
    """The colour and the marker of a method."""

    colour: str
    marker: Marker


# A method has one look in all figures. Two methods of one figure have markers of different shape, because nobody can
# tell fourteen colours apart, and a colour-blind reader fewer. Most colours are of Okabe and Ito, whose palette is safe
# for common colour blindness; the others differ from these in lightness, too.
DENSE = Look("#000000", "_")
TRUNCATION = Look("#777777", "s")
ENERGY = Look("#999933", "D")
GLOBAL_THRESHOLD = Look("#56B4E9", "^")
ALDS = Look("#CC79A7", "v")
AIMET = Look("#8C564B", "d")
SENSITIVITY = Look("#009E73", "P")
KNAPSACK = Look("#0072B2", "o")
REFITTED_KNAPSACK = Look("#332288", "p")
VERIFIED_JOINT = Look("#E69F00", "<")
JOINT = Look("#D55E00", "X")
BEST = Look("#800000", "*")  # the best form of joint selection, beside its other ones
LOSSLESS, VERIFIED_LOSSLESS = Look("#56B4E9", "^"), Look("#0072B2", "v")
COMPACT, VERIFIED_COMPACT = Look("#CC79A7", "D"), Look("#009E73", "o")
# Of Figure 6 alone.
REINFORCED = Look("#009E73", "v")
BAYESIAN = Look("#882255", "s")
EVBMF = Look("#E69F00", "d")
LAYER_THRESHOLD = Look("#DDCC77", "P")
PARS = Look("#222255", "<")
HALOC = Look("#762A83", "p")
CUTTLEFISH = Look("#BBBBBB", "h")
L0_GATES = Look("#225522", ">")
SVD_TRAINING = Look("#663333", (4, 1, 0))


def size(marker: Marker, points: float) -> float:
    """Return the size at which ``marker`` looks as large as a circle of ``points``. The arms of a star are thin."""
    return 1.6 * points if marker == "*" or isinstance(marker, tuple) else points
