#!/bin/bash
#
# Question: can a Go program end its sending side on a connection that it made by DialContext of golang.org/x/net/proxy?
#
# Why it matters: a program that copies in both directions asks for CloseWrite by a type assertion, and passes the FIN on only if
# it is there. With Dial it is there; after a change to DialContext, to get a timeout, the far end waits for the end of
# the request for ever, and nothing fails to compile. ReadFrom is gone, too, by which io.Copy lets the kernel move the bytes.
#
# Seen with: golang.org/x/net v0.62.0. Explained by: Dialer.Dial() in internal/socks/socks.go returns the connection to the server
# itself, and DialContext() wraps it in a type of an internal package that has the methods of net.Conn only. The documentation
# of the package proxy tells no difference. A forward dialer that keeps its *net.TCPConn is a way around it.

. "$(dirname "$0")/lib.bash"

space host
ip -n "$host" address add 203.0.113.1/32 dev lo
debs dante-server=1.4.2+dfsg-7+b8 libwrap0=7.6.q-32
cat >"$work/danted.conf" <<'CONF'
logoutput: stderr
internal: 203.0.113.1 port = 1080
external: lo
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }
CONF
start "$host" dante.log "$work/root/usr/sbin/danted" -f "$work/danted.conf" -p "$work/danted.pid"
go_program golang.org/x/net@v0.62.0 <<'GO'
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"time"

	"golang.org/x/net/proxy"
)

const target = "203.0.113.1:8000"

// serve answers each client after the end of its request.
func serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			request, _ := io.ReadAll(c)
			fmt.Fprintf(c, "%d bytes", len(request))
		}()
	}
}

// ask sends a request, ends it as far as the connection lets it, and returns what came back within three seconds.
func ask(c net.Conn, err error) string {
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "request")
	half, ok := c.(interface{ CloseWrite() error })
	if ok {
		half.CloseWrite()
	}
	_, from := c.(io.ReaderFrom)
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	answer, err := io.ReadAll(c)
	if err != nil {
		answer = []byte("no answer")
	}
	return fmt.Sprintf("%T, CloseWrite %t, ReadFrom %t, %s", c, ok, from, answer)
}

func main() {
	l, err := net.Listen("tcp", target)
	if err != nil {
		log.Fatal(err)
	}
	go serve(l)
	dialer, err := proxy.SOCKS5("tcp", "203.0.113.1:1080", nil, proxy.Direct)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("Dial:", ask(dialer.Dial("tcp", target)))
	fmt.Println("DialContext:", ask(dialer.(proxy.ContextDialer).DialContext(context.Background(), "tcp", target)))
}
GO
within 10 listening "$host" 1080
in_space "$host" "$work/program" >"$work/seen"
plain=$(sed -n 's/^Dial: //p' "$work/seen")
context=$(sed -n 's/^DialContext: //p' "$work/seen")
[[ $plain == "*net.TCPConn, CloseWrite true, ReadFrom true, 7 bytes" ]] || cannot "Dial is not as it should be: $plain"

report version "golang.org/x/net v0.62.0, $(go version | cut -d ' ' -f 3)"
report expected "Dial and DialContext of one dialer return the same kind of connection: $plain"
report seen "DialContext: $context"
conclude "$context" "*socks.Conn, CloseWrite false, ReadFrom false, no answer"
