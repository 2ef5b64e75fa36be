"""Writes an initramfs (cpio, "newc") without needing root or the cpio program.

    cpio.py ARCHIVE <list

Each line of the list is `DESTINATION SOURCE`, separated by a tab: a file, or a folder with all that is in it. Folders on the way to a
destination are made. The order is kept, so what the kernel looks for before it unpacks (ACPI tables) can come first.
"""

import os
import stat
import sys


class Archive:
    def __init__(self, out):
        self.out = out
        self.entries = 0
        self.folders = set()

    def add(self, destination, source):
        if os.path.isdir(source):
            self.folder(destination)
            for name in sorted(os.listdir(source)):
                self.add(f"{destination}/{name}", os.path.join(source, name))
            return
        self.folder(os.path.dirname(destination))
        with open(source, "rb") as file:
            executable = os.fstat(file.fileno()).st_mode & stat.S_IXUSR
            self.entry(destination, stat.S_IFREG | (0o755 if executable else 0o644), file.read())

    def folder(self, path):
        if path and path not in self.folders:
            self.folder(os.path.dirname(path))
            self.folders.add(path)
            self.entry(path, stat.S_IFDIR | 0o755, b"")

    def entry(self, name, mode, data):
        self.entries += 1
        encoded = name.encode() + b"\0"
        fields = (self.entries, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        self.out.write(b"070701" + b"".join(b"%08x" % field for field in fields))
        self.out.write(encoded)
        self.pad()
        self.out.write(data)
        self.pad()

    def pad(self):
        self.out.write(bytes(-self.out.tell() % 4))

    def finish(self):
        self.entry("TRAILER!!!", 0, b"")


def main():
    with open(sys.argv[1], "wb") as out:
        archive = Archive(out)
        for line in sys.stdin:
            destination, source = line.rstrip("\n").split("\t")
            archive.add(destination, source)
        archive.finish()


if __name__ == "__main__":
    main()
