"""Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): clothing, 28x28 grey, 60,000 + 10,000."""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from spectrim.data import idx
from spectrim.data.public import PublicSet
from spectrim.data.sources import Arrays
from spectrim.fetch.download import Package


def _ar_member(content: bytes, prefix: bytes) -> bytes:
    """Return the first member of an ar archive, such as a .deb, whose name begins with ``prefix``.

    The archive begins with 8 magic bytes. Each member is a header of 60 bytes and its content, padded to an even
    length. The header begins with the name and holds the decimal size at bytes 48 to 58.
    """
    position = 8
    while position < len(content):
        size = int(content[position + 48 : position + 58])
        if content.startswith(prefix, position):
            return content[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise ValueError(f"no member {prefix!r} in the archive")


def _decode_package(paths: Sequence[Path]) -> Arrays:
    with tarfile.open(fileobj=io.BytesIO(_ar_member(paths[0].read_bytes(), b"data.tar"))) as archive:
        members = [archive.extractfile(f"./usr/share/datasets/fashion-mnist/{name}") for name in idx.FILES]
        return idx.arrays_of([gzip.decompress(member.read()) for member in members if member])


SOURCE = idx.source(
    name="fashion_mnist",
    # The same files as on the authors' page, which has no https.
    site="https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    published={
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84": 26_421_880,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845": 29_515,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073": 4_422_102,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5": 5_148,
    },
    package=Package(
        client="apt-get",
        name="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        size=30_900_652,
    ),
    decode_package=_decode_package,
    sha256="ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619",
)


class FashionMNIST(PublicSet):
    """Fashion-MNIST, normalised by the training set's mean and standard deviation."""

    source, mean, std = SOURCE, (0.2860,), (0.3530,)
