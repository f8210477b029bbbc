package metrics

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/cmd/internal/privsock"
)

// Address is where the metrics are served. The zero value means nowhere.
type Address struct {
	Path string // of a unix socket
	TCP  netip.AddrPort
}

// maxPath is the maximum length of the path of a unix socket.
const maxPath = 107

// ParseAddress parses unix:PATH, ADDRESS:PORT, or PORT on 127.0.0.1.
func ParseAddress(text string) (Address, error) {
	if path, ok := strings.CutPrefix(text, "unix:"); ok {
		if !filepath.IsAbs(path) || len(path) > maxPath || strings.ContainsRune(path, 0) {
			return Address{}, fmt.Errorf("the path must begin with a slash and have at most %d bytes", maxPath)
		}
		return Address{Path: filepath.Clean(path)}, nil
	}
	if port, err := strconv.ParseUint(text, 10, 16); err == nil && port > 0 {
		return Address{TCP: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port))}, nil
	}
	at, err := netip.ParseAddrPort(text)
	if err != nil || at.Port() == 0 {
		return Address{}, errors.New("must be unix:PATH, ADDRESS:PORT or PORT, as in 127.0.0.1:9309")
	}
	return Address{TCP: at}, nil
}

// IsZero reports whether there is no address.
func (a Address) IsZero() bool { return a == Address{} }

// Local reports whether only processes on this host can connect.
func (a Address) Local() bool { return a.Path != "" || a.TCP.Addr().IsLoopback() }

// String returns the address in the form that ParseAddress takes.
func (a Address) String() string {
	if a.Path != "" {
		return "unix:" + a.Path
	}
	return a.TCP.String()
}

// listen listens at the address. It replaces a unix socket that a dead process has left behind, but no other file.
func (a Address) listen() (net.Listener, error) {
	if a.Path == "" {
		return net.ListenTCP("tcp", net.TCPAddrFromAddrPort(a.TCP))
	}
	if err := privsock.RemoveStale(a.Path); err != nil {
		return nil, err
	}
	l, err := privsock.Listen(a.Path, -1)
	if err != nil {
		return nil, fmt.Errorf("cannot make the socket: %w", err)
	}
	return l, nil
}
