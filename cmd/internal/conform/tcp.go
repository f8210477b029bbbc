package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// settle is how long a FIN or RST may take through a server that passes it.
const settle = 300 * time.Millisecond

// targets asks for one target of each kind.
func (p *prober) targets(ctx context.Context) {
	r, e := p.report, p.Ends
	r.Open = p.try(ctx, socks.AddrFrom(e.TCP), p.Wait)
	r.Refused = p.try(ctx, socks.AddrFrom(e.Refused), p.Wait)
	r.Unreachable = p.try(ctx, socks.AddrFrom(e.Unreachable), 2*p.Wait)
	r.IPv6 = p.try(ctx, socks.AddrFrom(e.TCP6), p.Wait)
	if e.Name != "" {
		r.Name = p.try(ctx, socks.Addr{Name: e.Name, Port: e.TCP.Port()}, p.Wait)
	}
}

// try asks for dst and, if it is granted, checks whether a far end is there.
func (p *prober) try(ctx context.Context, dst socks.Addr, limit time.Duration) Answer {
	return p.tryOf(ctx, p.Server, dst, limit)
}

func (p *prober) tryOf(ctx context.Context, s socks.Server, dst socks.Addr, limit time.Duration) Answer {
	if dst.Name == "" && !dst.IP.IsValid() {
		return Answer{}
	}
	c, a, _ := p.ask(ctx, s, socks.CmdConnect, dst, limit)
	if a.Kind == Granted {
		defer c.Close()
		c.SetDeadline(time.Now().Add(p.Wait))
		a.First, a.Works = greeted(c)
		a.Early = !a.First
	}
	return a
}

// greeted reads the far end's first bytes, and lets it send something back.
func greeted(c net.Conn) (first, works bool) {
	if hello(c) != nil {
		return false, false
	}
	const text = "echo\nwhat was said"
	if _, err := io.WriteString(c, text); err != nil {
		return true, false
	}
	b := make([]byte, len(text)-len("echo\n"))
	_, err := io.ReadFull(c, b)
	return true, err == nil && strings.HasSuffix(text, string(b))
}

var errHello = errors.New("the far end does not greet")

func hello(c net.Conn) error {
	b := make([]byte, len(farHello))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != farHello {
		return errHello
	}
	return nil
}

// command connects to the far end and sends it a line.
func (p *prober) command(ctx context.Context, line string) (net.Conn, error) {
	c, a, _ := p.ask(ctx, p.Server, socks.CmdConnect, socks.AddrFrom(p.Ends.TCP), p.Wait)
	if a.Kind != Granted {
		return nil, fmt.Errorf("the far end cannot be reached: %v", a)
	}
	c.SetDeadline(time.Now().Add(p.Wait))
	err := hello(c)
	if err == nil {
		_, err = io.WriteString(c, line+"\n")
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (p *prober) token() string { return fmt.Sprint(p.id.Add(1)) }

// result returns what the far end recorded about a connection: "fin", "reset" or "open", and how many bytes it read.
func (p *prober) result(ctx context.Context, token string) (how string, n int) {
	c, err := p.command(ctx, "result "+token)
	if err != nil {
		return "", 0
	}
	defer c.Close()
	line, err := readLine(c)
	if err != nil {
		return "", 0
	}
	fmt.Sscan(line, &how, &n)
	return how, n
}

func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (p *prober) halfClose(ctx context.Context) {
	if p.report.Open.Works {
		p.report.HalfCloseUp = p.halfCloseUp(ctx)
		p.report.HalfCloseDown = p.halfCloseDown(ctx)
	}
}

// halfCloseUp sends FIN and waits for an answer after it.
func (p *prober) halfCloseUp(ctx context.Context) Passage {
	const sent = 10_000
	c, err := p.command(ctx, "count")
	if err != nil {
		return Unknown
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, sent)); err != nil {
		return Unknown
	}
	if closeWrite(c) != nil {
		return Unknown
	}
	want := fmt.Sprintf("%d\n", sent)
	got, err := io.ReadAll(io.LimitReader(c, farAnswer+farLine))
	switch {
	case err == nil && strings.HasPrefix(string(got), want) && len(got) == len(want)+farAnswer:
		return Passed
	case err != nil && ending(err).Kind == Silence:
		return Lost
	}
	return CutOff
}

// halfCloseDown lets the far end send FIN, and sends bytes after that.
func (p *prober) halfCloseDown(ctx context.Context) Passage {
	const sent = 10_000
	token := p.token()
	c, err := p.command(ctx, "fin "+token)
	if err != nil {
		return Unknown
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		if ending(err).Kind == Silence {
			return Lost
		}
		return CutOff
	}
	time.Sleep(settle)
	c.SetDeadline(time.Now().Add(p.Wait))
	// Write two parts, with time for a RST in answer to the first.
	for range 2 {
		if _, err := c.Write(make([]byte, sent/2)); err != nil {
			return CutOff
		}
		time.Sleep(settle / 3)
	}
	c.Close()
	if how, n := p.result(ctx, token); how != "fin" || n != sent {
		return CutOff
	}
	return Passed
}

func (p *prober) resets(ctx context.Context) {
	if p.report.Open.Works {
		p.report.ResetUp = p.resetUp(ctx)
		p.report.ResetDown = p.resetDown(ctx)
	}
}

func (p *prober) resetUp(ctx context.Context) Passage {
	token := p.token()
	c, err := p.command(ctx, "record "+token)
	if err != nil {
		return Unknown
	}
	defer c.Close()
	l, ok := c.(interface{ SetLinger(int) error })
	if !ok {
		return Unknown
	}
	time.Sleep(settle)
	l.SetLinger(0)
	c.Close()
	switch how, _ := p.result(ctx, token); how {
	case "reset":
		return Passed
	case "fin":
		return BecameFIN
	case "open":
		return Lost
	}
	return Unknown
}

func (p *prober) resetDown(ctx context.Context) Passage {
	c, err := p.command(ctx, "reset")
	if err != nil {
		return Unknown
	}
	defer c.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(c, 1<<20))
	switch {
	case err == nil:
		return BecameFIN
	case errors.Is(err, syscall.ECONNRESET):
		return Passed
	case ending(err).Kind == Silence:
		return Lost
	}
	return Unknown
}
