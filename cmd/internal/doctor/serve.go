package doctor

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/conform"
)

// Serve runs the far end for --peer until ctx ends.
func Serve(ctx context.Context, cfg *config.Config, out io.Writer) error {
	f, at, err := listen(cfg.ServeAt)
	if err != nil {
		return fmt.Errorf("cannot serve: %w", err)
	}
	defer f.Close()
	port := f.TCP().Port()
	_, err = fmt.Fprintf(out, `viasocks doctor: serving at %s (TCP and UDP; UDP at port %d too), until stopped
on the host that is to be examined: viasocks doctor --proxy URL --peer THIS-HOST:%d
`, strings.Join(at, " and "), port+1, port)
	if err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// listen listens on all addresses if none is given; on a host without IPv6, these are those of IPv4.
func listen(at []netip.AddrPort) (f *conform.FarEnd, words []string, err error) {
	if len(at) > 0 {
		f, err = conform.Serve(at...)
		for _, a := range at {
			words = append(words, a.String())
		}
		return f, words, err
	}
	all := []netip.AddrPort{
		netip.AddrPortFrom(
			netip.IPv4Unspecified(),
			conform.DefaultPort,
		), netip.AddrPortFrom(netip.IPv6Unspecified(), conform.DefaultPort),
	}
	if f, err = conform.Serve(all...); err != nil {
		var ferr error
		if f, ferr = conform.Serve(all[0]); ferr != nil {
			return nil, nil, err
		}
		return f, []string{fmt.Sprintf("all IPv4 addresses, port %d", conform.DefaultPort)}, nil
	}
	return f, []string{fmt.Sprintf("all addresses, port %d", conform.DefaultPort)}, nil
}
