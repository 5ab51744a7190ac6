// SPDX-License-Identifier: GPL-2.0-or-later
//
// yamux - a multiplexer to compare with
//
//	yamux far SOCKET TARGET	accepts one channel at SOCKET, and for each
//				stream in it connects to TARGET (host:port)
//	yamux near SOCKET	connects to that, and prints the port of which
//				each connection becomes a stream
//
// With windows of 4 MiB, as one would have it for speed.
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"os"

	"github.com/hashicorp/yamux"
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// join carries bytes both ways until one side ends
func join(a, b net.Conn) {
	go func() {
		io.Copy(a, b)
		a.Close()
	}()
	io.Copy(b, a)
	b.Close()
}

func far(socket, target string, config *yamux.Config) {
	listener, err := net.Listen("unix", socket)
	must(err)
	channel, err := listener.Accept()
	must(err)
	session, err := yamux.Server(channel, config)
	must(err)
	for {
		stream, err := session.Accept()
		must(err)
		go func() {
			conn, err := net.Dial("tcp", target)
			must(err)
			join(stream, conn)
		}()
	}
}

func near(socket string, config *yamux.Config) {
	channel, err := net.Dial("unix", socket)
	must(err)
	session, err := yamux.Client(channel, config)
	must(err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Printf("listening on %s\n", listener.Addr())
	for {
		conn, err := listener.Accept()
		must(err)
		go func() {
			stream, err := session.Open()
			must(err)
			join(conn, stream)
		}()
	}
}

func main() {
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = 4 << 20
	switch {
	case len(os.Args) == 4 && os.Args[1] == "far":
		far(os.Args[2], os.Args[3], config)
	case len(os.Args) == 3 && os.Args[1] == "near":
		near(os.Args[2], config)
	default:
		log.Fatal("usage: yamux far SOCKET TARGET | near SOCKET")
	}
}
