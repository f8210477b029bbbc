package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/viasocks/viasocks/socks"
)

const cmdBind socks.Command = 2

// bind asks for a connection from the far end, has it made, and looks at both replies.
func (p *prober) bind(ctx context.Context) {
	if !p.report.Open.Works {
		return
	}
	b := &p.report.Bind
	c, first, bound := p.ask(ctx, cmdBind, socks.AddrFrom(p.Ends.TCP), p.Wait)
	b.First = first
	if first.Kind != Granted {
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(p.Wait))
	asked := time.Now()
	far, err := p.command(ctx, fmt.Sprint("dial ", bound.Port))
	if err != nil {
		b.Second = Answer{Kind: Failed, Error: err.Error()}
		return
	}
	defer far.Close()
	from, err := readLine(far)
	if err != nil {
		b.Second = Answer{Kind: Failed, Error: err.Error()}
		return
	}
	if why, failed := strings.CutPrefix(from, "failed "); failed {
		b.Second = Answer{Kind: Failed, Error: "the far end cannot connect: " + why}
		return
	}
	peer, reply, err := readReply(c)
	b.Second = answer(reply, err)
	b.Second.After = time.Since(asked).Milliseconds()
	if err != nil {
		return
	}
	b.Second.Bound = peer.String()
	b.Peer = peer.AddrPort().String() == from
	b.Second.Works = echoes(c)
}

// echoes reports whether what is sent comes back.
func echoes(c net.Conn) bool {
	const text = "what was said"
	if _, err := io.WriteString(c, text); err != nil {
		return false
	}
	b := make([]byte, len(text))
	_, err := io.ReadFull(c, b)
	return err == nil && string(b) == text
}

// readReply reads a reply of RFC 1928, section 6, by itself: package socks reads one only behind a request.
func readReply(r io.Reader) (bound socks.Addr, reply []byte, err error) {
	b := make([]byte, 4, 4+1+255+2)
	n, err := io.ReadFull(r, b)
	if err != nil {
		return bound, b[:n], err
	}
	size := 0
	switch b[3] {
	case 1:
		size = 4
	case 4:
		size = 16
	case 3:
		b = b[:5]
		if _, err := io.ReadFull(r, b[4:]); err != nil {
			return bound, b[:4], err
		}
		size = int(b[4])
	}
	if b[0] != 5 || size == 0 {
		return bound, b, fmt.Errorf("%w: % x", socks.ErrMalformed, b)
	}
	head := len(b)
	b = b[:head+size+2]
	if _, err := io.ReadFull(r, b[head:]); err != nil {
		return bound, b[:head], err
	}
	if b[1] != 0 {
		return bound, b, socks.Reply(b[1])
	}
	host := b[head : head+size]
	bound.Port = uint16(b[len(b)-2])<<8 | uint16(b[len(b)-1])
	if b[3] == 3 {
		bound.Name = string(host)
		return bound, b, nil
	}
	ip, ok := netip.AddrFromSlice(host)
	if !ok {
		return bound, b, errors.New("no address")
	}
	bound.IP = ip.Unmap()
	return bound, b, nil
}
