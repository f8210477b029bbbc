package conform

import (
	"context"
	"encoding/binary"
	"io"
	"time"
)

// Answers of SOCKS4: VN, CD, and an address that is of no use.
const (
	len4     = 8
	granted4 = 0x5a
)

// socks4 asks for the far end in the words of SOCKS4, with its address, and of SOCKS4a, with its name.
func (p *prober) socks4(ctx context.Context) {
	at := p.Ends.TCP
	if !at.Addr().Is4() {
		return
	}
	ip := at.Addr().As4()
	request := binary.BigEndian.AppendUint16([]byte{4, 1}, at.Port())
	p.report.SOCKS4 = p.ask4(ctx, append(append(request, ip[:]...), 0))
	if p.Ends.Name != "" {
		named := append(request[:4:4], 0, 0, 0, 1, 0)
		p.report.SOCKS4a = p.ask4(ctx, append(append(named, p.Ends.Name...), 0))
	}
}

func (p *prober) ask4(ctx context.Context, request []byte) Answer {
	c, err := p.dial(ctx, p.Wait)
	if err != nil {
		return Answer{Kind: Failed, Error: err.Error()}
	}
	defer c.Close()
	asked := time.Now()
	if _, err := c.Write(request); err != nil {
		return ending(err)
	}
	var reply [len4]byte
	n, err := io.ReadFull(c, reply[:])
	a := Answer{Kind: Granted}
	switch {
	case err != nil && n == 0:
		a = ending(err)
	case err != nil || reply[0] != 0:
		a = Answer{Kind: Malformed}
	case reply[1] != granted4:
		a = Answer{Kind: Refused, Code: int(reply[1])}
	default:
		a.First, a.Works = greeted(c)
		a.Early = !a.First
	}
	a.After = time.Since(asked).Milliseconds()
	return a
}
