package relay

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// GSO says whether runs of datagrams go to the kernel as one message with UDP_SEGMENT (udp(7)), which cuts it into datagrams
// again. The alternative is a message for each datagram, still many to a system call (sendmmsg(2)): the datagrams that leave
// the host are the same, and in runs of 64 each takes four times the CPU time (BenchmarkSend).
//
// Linux 7.0 to 7.1.4 get it wrong with some network cards. If all datagrams of a run have the same size, a card that cuts with
// the kernel's help (GSO_PARTIAL) is given a wrong UDP length and checksum, and the receiver drops the whole run. No system call
// reports an error, and whether a card is such a one cannot be asked. The fault came with commit b10b446ce7ad of 7.0-rc1.
//
// Two neighbours of UDP_SEGMENT are not affected, because no such card cuts their frames. UDP_GRO only receives. The super-frames
// of the TUN (tun.USO) are read whole, and those that are written reach a socket of this host, for which the kernel cuts them
// itself. The exception is a host that forwards them to a neighbour by such a card: --offload nouso is for it.
type GSO uint8

const (
	GSOAuto GSO = iota // on, except where the kernel is known to get it wrong
	GSOOn
	GSOOff
)

var gsoNames = [...]string{"auto", "on", "off"}

// String is the word of the option: auto, on, off.
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

// Decide says whether UDP_SEGMENT is used on a kernel of that release (KernelRelease), and why, for people. A release that is
// not understood may be one of those that get it wrong: GSOAuto is off then.
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

// version is a kernel's: 7.1.4. A release candidate counts as what it will be.
type version [3]int

// gsoBroken reports whether the kernel gets UDP_SEGMENT wrong. Of the candidates of 7.0 the first has the fault already.
func gsoBroken(v version) bool {
	return v[0] == 7 && (v[1] == 0 || v[1] == 1 && v[2] <= 4)
}

// parseRelease takes the numbers at the front of a release as uname(2) has it: 7.1.4-arch1-1 and 6.18 have them. What follows
// the numbers is the distributor's.
func parseRelease(s string) (version, bool) {
	var v version
	for i := range v {
		n := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
		if n < 0 {
			n = len(s)
		}
		var err error
		if v[i], err = strconv.Atoi(s[:n]); err != nil {
			return version{}, false // nothing there, or too long for a number
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

// KernelRelease is the release of the running kernel as uname(2) has it, or "" if it cannot be asked.
func KernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	b, _, _ := bytes.Cut(u.Release[:], []byte{0})
	return string(b)
}

// SetGSO says whether links use UDP_SEGMENT, from their next Send on. A new loop's links do. Any goroutine.
func (l *Loop) SetGSO(on bool) { l.noGSO.Store(!on) }
