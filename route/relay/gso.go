package relay

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// GSO tells whether a run of datagrams is passed to the kernel as one message with UDP_SEGMENT (udp(7)), which the
// kernel cuts into datagrams again. The alternative is one message for each datagram, still many in one system call
// (sendmmsg(2)). The datagrams that leave the host are the same, but in runs of 64 each costs four times the CPU time
// (BenchmarkSend).
//
// Linux 7.0 to 7.1.4 has a fault with some network cards. If all datagrams of a run have the same size, a card that
// cuts with the kernel's help (GSO_PARTIAL) gets a wrong UDP length and checksum, and the receiver drops the whole
// run. No system call reports an error, and there is no way to find out whether a card is affected. The fault came
// with commit b10b446ce7ad of 7.0-rc1.
//
// Two related features are not affected, because no such card cuts their frames. UDP_GRO only receives. The
// super-frames of the TUN (tun.USO) are read whole, and those that are written reach a socket of this host, for which
// the kernel cuts them itself. The exception is a host that forwards them to a neighbour through such a card; it
// needs --offload nouso.
type GSO uint8

const (
	GSOAuto GSO = iota // on, except on kernels with the fault
	GSOOn
	GSOOff
)

var gsoNames = [...]string{"auto", "on", "off"}

// String returns the value of the option: auto, on or off.
func (g GSO) String() string {
	if int(g) < len(gsoNames) {
		return gsoNames[g]
	}
	return fmt.Sprintf("gso(%d)", uint8(g))
}

// ParseGSO is the inverse of String.
func ParseGSO(s string) (GSO, error) {
	for i, name := range gsoNames {
		if s == name {
			return GSO(i), nil
		}
	}
	return 0, fmt.Errorf("cannot use UDP GSO %q: it is one of auto, on, off", s)
}

// Decide returns whether UDP_SEGMENT is used on a kernel of that release (KernelRelease), and the reason as text. A
// release that cannot be parsed may have the fault, so GSOAuto is off then.
func (g GSO) Decide(release string) (on bool, why string) {
	if g != GSOAuto {
		return g == GSOOn, "as --udp-gso says"
	}
	v, ok := parseRelease(release)
	switch {
	case !ok:
		return false, fmt.Sprintf("the kernel's release %q is not understood", release)
	case gsoBroken(v):
		return false, fmt.Sprintf("Linux %s spoils datagrams with some network cards; Linux 7.1.5 does not", release)
	}
	return true, fmt.Sprintf("Linux %s has no known fault", release)
}

// version is a kernel version such as 7.1.4. A release candidate counts as the release that it precedes.
type version [3]int

// gsoBroken reports whether the kernel has the fault with UDP_SEGMENT. It is in 7.0 from the first release candidate
// on.
func gsoBroken(v version) bool {
	return v[0] == 7 && (v[1] == 0 || v[1] == 1 && v[2] <= 4)
}

// parseRelease parses the numbers at the front of a release as in uname(2), such as 7.1.4-arch1-1 and 6.18. The rest
// is the distributor's.
func parseRelease(s string) (version, bool) {
	var v version
	for i := range v {
		n := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
		if n < 0 {
			n = len(s)
		}
		var err error
		if v[i], err = strconv.Atoi(s[:n]); err != nil {
			return version{}, false // no number, or too long for one
		}
		s = s[n:]
		if !strings.HasPrefix(s, ".") || len(s) < 2 || s[1] < '0' || s[1] > '9' {
			if i == 0 {
				return version{}, false
			}
			break
		}
		s = s[1:]
	}
	return v, true
}

// KernelRelease returns the release of the running kernel as in uname(2), or "" if it is not available.
func KernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	b, _, _ := bytes.Cut(u.Release[:], []byte{0})
	return string(b)
}

// SetGSO sets whether links use UDP_SEGMENT from their next Send on. The links of a new loop do. It may be called
// from any goroutine.
func (l *Loop) SetGSO(on bool) { l.noGSO.Store(!on) }
