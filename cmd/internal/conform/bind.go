package conform

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// bind asks for a connection from the far end, has it made, and checks both replies.
func (p *prober) bind(ctx context.Context) {
	if !p.report.Open.Works {
		return
	}
	b := &p.report.Bind
	c, first, h := p.ask(ctx, p.Server, socks.CmdBind, socks.AddrFrom(p.Ends.TCP), p.Wait)
	b.First = first
	if first.Kind != Granted {
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(p.Wait))
	asked := time.Now()
	far, err := p.command(ctx, fmt.Sprint("dial ", h.Bound().Port))
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
	h.Again()
	reply, _, err := shake(c, h)
	b.Second = answer(reply, err)
	b.Second.After = time.Since(asked).Milliseconds()
	if err != nil {
		return
	}
	b.Second.Bound = h.Bound().String()
	b.Peer = h.Bound().AddrPort().String() == from
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
