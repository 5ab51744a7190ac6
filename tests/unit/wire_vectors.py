#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
#
# wire_vectors.py - the numbers of test_wire.c, from README's "THE WIRE" alone
#
# It prints them as the test has them; run it if the wire changes.
MASK = 2**64 - 1
MAGIC = int.from_bytes(b'qemu-vp1', 'big')


def mix(x):
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9 & MASK
    x = (x ^ x >> 27) * 0x94d049bb133111eb & MASK
    return x ^ x >> 31


def key(seed, n):
    return [mix(seed + i * 0x9e3779b97f4a7c15 & MASK) for i in range(1, n + 1)]


def block_sum(words, data):
    total = 0
    for i in range(0, len(data), 8):
        x = int.from_bytes(data[i:i + 8], 'little') + words[i // 8] & MASK
        total += (x & 0xffffffff) * (x >> 32)
    return total


def payload_check(seed, data):
    words, x = key(seed ^ MASK, 128), len(data)
    for i in range(0, len(data), 1024):
        x = mix(x + block_sum(words, data[i:i + 1024]) & MASK)
    return x


def header_check(seed, digest, rest):
    words = key(seed, 5)
    return words[4] + digest + block_sum(words, rest) & MASK


def seed(sender, receiver):
    return mix(mix(sender) + receiver & MASK)


def main():
    data = bytes(i * 7 + i // 256 + 1 & 255 for i in range(65496))
    print('payloads, by length:')
    for n in (0, 1, 4, 8, 33, 1000, 1024, 1025, 65496):
        print('        { %d, %#x },' % (n, payload_check(0x0123456789abcdef,
                                                      data[:n])))
    print('header: %#x' % header_check(0x0123456789abcdef, 0xfedcba9876543210,
                                       data[:32]))
    print('seed of tokens 1 and 2: %#x' % seed(1, 2))
    print('key of HELLO\'s header:')
    print(''.join('    %#x,\n' % word for word in key(MAGIC, 5)), end='')


main()
