package conform

import (
	"context"

	"github.com/viasocks/viasocks/socks"
)

// socks4 asks for the far end by SOCKS4, with its address, and by SOCKS4a, with its name. The user is empty.
func (p *prober) socks4(ctx context.Context) {
	at := p.Ends.TCP
	if !at.Addr().Is4() {
		return
	}
	p.report.SOCKS4 = p.tryOf(ctx, speaking("socks4"), socks.AddrFrom(at), p.Wait)
	if p.Ends.Name != "" {
		p.report.SOCKS4a = p.tryOf(ctx, speaking("socks4a"), socks.Addr{Name: p.Ends.Name, Port: at.Port()}, p.Wait)
	}
}

// speaking returns a server that only defines the protocol version: Config.Dial knows where it is.
func speaking(scheme string) socks.Server {
	s, err := socks.ParseServer(scheme + "://127.0.0.1")
	if err != nil {
		panic(err) // the URL is constant
	}
	return s
}
