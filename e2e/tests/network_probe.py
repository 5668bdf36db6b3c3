# What a guest tries on the network: `tcp ADDRESS PORT` and `ping ADDRESS` say "yes" or "no: why"; `udp` sends one datagram in a
# frame of its own making, with whatever sender it is told.
import os
import socket
import struct
import sys


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def total(data):
    data += b"\0" * (len(data) % 2)
    value = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return ~value & 0xFFFF


def tcp(address, port):
    with socket.socket(family(address), socket.SOCK_STREAM) as stream:
        stream.settimeout(8)
        stream.connect((address, int(port)))


def ping(address):
    six = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    with socket.socket(family(address), socket.SOCK_RAW, protocol) as raw:
        raw.settimeout(2)
        for number in range(3):
            echo = struct.pack("!BBHHH", 128 if six else 8, 0, 0, os.getpid() & 0xFFFF, number)
            # The kernel fills in the checksum in IPv6 alone.
            raw.sendto(echo if six else echo[:2] + struct.pack("!H", total(echo)) + echo[4:], (address, 0))
            try:
                for _ in range(20):
                    data, sender = raw.recvfrom(2048)
                    kind = data[0] if six else data[20]
                    if sender[0] == address and kind == (129 if six else 0):
                        return
            except socket.timeout:
                pass
    raise OSError("no answer")


def udp(link, to_mac, from_mac, source, destination, port, word):
    six = ":" in destination
    mac = lambda text: bytes.fromhex(text.replace(":", ""))
    ends = socket.inet_pton(family(source), source) + socket.inet_pton(family(destination), destination)
    datagram = struct.pack("!HHHH", 4242, int(port), 8 + len(word), 0) + word.encode()
    pseudo = ends + struct.pack("!HH", 17, len(datagram))
    datagram = datagram[:6] + struct.pack("!H", total(pseudo + datagram) or 0xFFFF) + datagram[8:]
    if six:
        packet = struct.pack("!IHBB", 6 << 28, len(datagram), 17, 64) + ends + datagram
    else:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 1, 0, 64, 17, 0) + ends
        packet = head[:10] + struct.pack("!H", total(head)) + head[12:] + datagram
    frame = mac(to_mac) + mac(from_mac) + struct.pack("!H", 0x86DD if six else 0x0800) + packet
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((link, 0))
        for _ in range(3):
            raw.send(frame)


try:
    {"tcp": tcp, "ping": ping, "udp": udp}[sys.argv[1]](*sys.argv[2:])
    print("yes")
except OSError as error:
    print("no:", error)
