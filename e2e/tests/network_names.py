# The outside's name server, on port 53 of the address in the first argument: knows the names of the others (`NAME=ADDRESS`) and
# writes down what it is asked for, each on a line, in the file of the second.
import socket
import struct
import sys

own, log = sys.argv[1:3]
names = dict(pair.split("=") for pair in sys.argv[3:])
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((own, 53))
with open(log, "w", buffering=1) as out:
    while True:
        question, sender = server.recvfrom(4096)
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1:at + 1 + question[at]].decode().lower())
            at += 1 + question[at]
        kind = struct.unpack("!H", question[at + 1:at + 3])[0]
        name = ".".join(labels)
        out.write(name + "\n")
        found = name in names and kind == 1
        code = 0 if name in names else 3
        answer = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(names[name]) if found else b""
        head = question[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, int(found), 0, 0)
        server.sendto(head + question[12:at + 5] + answer, sender)
