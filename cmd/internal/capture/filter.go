package capture

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// Limits of a capture, and their defaults.
const (
	DefaultCount, MaxCount = 100_000, 1 << 30
	DefaultBytes, MaxBytes = 100 << 20, 1 << 40
	DefaultTime, MaxTime   = time.Minute, 24 * time.Hour
	// MaxText limits the name of a program or destination, in bytes.
	MaxText = 255
)

// Filter tells what to capture, and how much.
type Filter struct {
	Flow        uint64 // its ID; 0: all
	Program     string // the process id, or the executable's path or last part; empty: all
	Destination string // an address, a network, an address and port, or a name; empty: all

	Count int
	Bytes int64
	Time  time.Duration
}

// Check sets the defaults, and returns an error if a value is invalid.
func (f *Filter) Check() error {
	if f.Count == 0 {
		f.Count = DefaultCount
	}
	if f.Bytes == 0 {
		f.Bytes = DefaultBytes
	}
	if f.Time == 0 {
		f.Time = DefaultTime
	}
	if f.Count < 0 || f.Count > MaxCount || f.Bytes < 0 || f.Bytes > MaxBytes || f.Time < 0 || f.Time > MaxTime {
		return errors.New("a limit is out of its range")
	}
	if len(f.Program) > MaxText || len(f.Destination) > MaxText {
		return errors.New("the program or the destination is too long")
	}
	_, err := parseDestination(f.Destination)
	return err
}

// destination is a parsed Filter.Destination.
type destination struct {
	net  netip.Prefix // if it is valid
	port uint16       // 0: any
	name string       // instead of net; empty: none
}

// parseDestination parses an address, a network, ADDRESS:PORT, :PORT, or a name.
func parseDestination(text string) (d destination, err error) {
	if text == "" {
		return d, nil
	}
	if at, err := netip.ParseAddrPort(text); err == nil {
		return destination{net: netip.PrefixFrom(at.Addr(), at.Addr().BitLen()), port: at.Port()}, nil
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return destination{net: netip.PrefixFrom(a, a.BitLen())}, nil
	}
	if n, err := netip.ParsePrefix(text); err == nil {
		return destination{net: n.Masked()}, nil
	}
	name, port, hasPort := strings.Cut(text, ":")
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return d, errors.New("the destination must be an address, a network, a name, or one of these with a port, as in :443")
		}
		d.port = uint16(n)
	}
	if strings.ContainsAny(name, "/ \t") || name == "" && !hasPort {
		return d, errors.New("the destination must be an address, a network, a name, or one of these with a port, as in :443")
	}
	d.name = strings.ToLower(strings.TrimSuffix(name, "."))
	return d, nil
}

// matches reports whether a packet belongs to the destination. host is the name by which the program asked for the
// flow, if it is known.
func (d *destination) matches(to netip.AddrPort, host string) bool {
	switch {
	case d.port != 0 && to.Port() != d.port:
		return false
	case d.net.IsValid():
		return d.net.Contains(to.Addr())
	case d.name != "":
		host = strings.ToLower(strings.TrimSuffix(host, "."))
		return host == d.name || strings.HasSuffix(host, "."+d.name)
	}
	return true
}

// isProgram reports whether a flow belongs to the program that text names.
func isProgram(f *control.Flow, text string) bool {
	if n, err := strconv.Atoi(text); err == nil {
		return f.PID == n
	}
	return f.Exe != "" && (f.Exe == text || filepath.Base(f.Exe) == text)
}
