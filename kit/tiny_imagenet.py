"""Tiny ImageNet, fetched once: 100,000 + 10,000 photographs of 200 ImageNet classes, 64 x 64."""
import shutil
import socket
import zipfile
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from kit.process import check_disk
from kit.store import InputError

NAME = "tiny-imagenet"  # as --data
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ROOM = 248_100_043 + 800_000_000  # bytes: of the archive, and of 120,000 files in 4 kB blocks


def fetch_tiny_imagenet(data: Path = Path("data")) -> Path:
    """The folder of Tiny ImageNet in `data`, downloaded and unpacked unless it is there.

    Raises InputError without network, for another file than was expected, and without room.
    """
    folder = data / "tiny-imagenet-200"
    if folder.is_dir():
        return folder
    check_disk(data, ROOM)
    print(f"      fetching Tiny ImageNet (248 MB) into {data}, once")
    part = data / "tiny-imagenet-200.part"  # renamed when it is whole
    shutil.rmtree(part, ignore_errors=True)
    socket.setdefaulttimeout(60)  # seconds of silence
    try:
        download_and_extract_archive(URL, data, part, md5=MD5, remove_finished=True)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"Tiny ImageNet could not be fetched from {URL} ({error}): give the same command again "
            "for another try, or unpack that file elsewhere and give its folder as --data"
        ) from error
    finally:
        socket.setdefaulttimeout(None)
    (part / "tiny-imagenet-200").rename(folder)
    part.rmdir()
    return folder
