# Prints every IP packet that comes in by an interface, a line each: the size of the pieces that a super-packet is to be
# cut into (or 0), whether the transport checksum is left to the hardware, and the bytes in hexadecimal. Packets that it
# is told in hexadecimal, a line each, it sends out of the interface.
import socket
import sys
import threading

SOL_PACKET, PACKET_VNET_HDR, SO_RCVBUFFORCE = 263, 15, 33
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 3, 0x0800, 0x86DD
NEEDS_CSUM, ARPHRD_ETHER = 1, 1
INTERFACE = sys.argv[1]

watcher = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
watcher.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
# struct virtio_net_hdr of 10 bytes in front of each packet.
watcher.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
watcher.bind((INTERFACE, ETH_P_ALL))
sender = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)


def send():
    for line in sys.stdin:
        packet = bytes.fromhex(line)
        protocol = ETH_P_IPV6 if packet[0] >> 4 == 6 else ETH_P_IP
        sender.sendto(packet, (INTERFACE, protocol))


threading.Thread(target=send, daemon=True).start()
print("ready", flush=True)
while True:
    bytes_, (_, _, kind, hardware, _) = watcher.recvfrom(1 << 17)
    if kind == socket.PACKET_OUTGOING:
        continue
    flags, pieces = bytes_[0], int.from_bytes(bytes_[4:6], sys.byteorder)
    packet = bytes_[10 + (14 if hardware == ARPHRD_ETHER else 0):]
    if packet[0] >> 4 in (4, 6):
        print(pieces, flags & NEEDS_CSUM, packet.hex(), flush=True)
