"""A Redis Cluster of one node that holds one f32 table of rows and answers slowly. Import it, or see `limits.py`."""

import socket
import struct
import threading
import time
import zlib

HEADER = 4096


def bulk(value):
    return b"$%d\r\n%s\r\n" % (len(value), value)


class SlowRedis:
    """Serves the table file at `path`, and waits `row_delay` seconds before each row."""

    def __init__(self, path, row_delay):
        with open(path, "rb") as file:
            self.data = file.read()
        _, width = struct.unpack("<QQ", self.data[16:32])
        self.row = 4 * width
        # Rows of one value of the cluster, each with its checksum.
        self.per_value = max(1, ((16 << 10) - 32) // (self.row + 4))
        self.row_delay = row_delay
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.answer, args=(client,), daemon=True).start()

    def answer(self, client):
        try:
            stream = client.makefile("rb")
            while first := stream.readline():
                words = []
                for _ in range(int(first[1:])):
                    length = int(stream.readline()[1:])
                    words.append(stream.read(length))
                    stream.read(2)
                client.sendall(self.reply(words[0].upper(), words))
        except (OSError, ValueError):
            pass  # The client has left.

    def reply(self, name, words):
        if name == b"CLUSTER" and words[1].upper() == b"SLOTS":
            return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % self.port
        if name == b"CLUSTER" and words[1].upper() == b"SHARDS":
            node = [b"id", b"a" * 40, b"port", self.port, b"ip", b"127.0.0.1", b"endpoint", b"127.0.0.1",
                    b"role", b"master", b"replication-offset", 1, b"health", b"online"]
            fields = b"".join(b":%d\r\n" % field if isinstance(field, int) else bulk(field) for field in node)
            return (b"*1\r\n*4\r\n" + bulk(b"slots") + b"*2\r\n:0\r\n:16383\r\n" + bulk(b"nodes")
                    + b"*1\r\n*%d\r\n" % len(node) + fields)
        if name == b"GET":
            return bulk(self.data[:HEADER])
        if name == b"GETRANGE":
            time.sleep(self.row_delay)
            value, start = int(words[1].rsplit(b":", 1)[1]), int(words[2])
            number = value * self.per_value + start // (self.row + 4)
            row = self.data[HEADER + number * self.row:][:self.row]
            return bulk(row + struct.pack("<I", zlib.crc32(struct.pack("<Q", number) + row)))
        return b"+OK\r\n"
