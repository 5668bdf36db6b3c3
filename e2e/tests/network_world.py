# The outside: answers TCP on the port of its first argument, and writes down the datagrams that come to the same port.
import socket
import sys
import threading

port, log = int(sys.argv[1]), sys.argv[2]
streams = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
datagrams.bind(("::", port))


def listen():
    with open(log, "ab", buffering=0) as out:
        while True:
            out.write(datagrams.recv(2048) + b"\n")


threading.Thread(target=listen, daemon=True).start()
while True:
    streams.accept()[0].close()
