package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// mtuTime limits the wait until a large packet is acknowledged. Linux retransmits it several times in this time.
	mtuTime = 2500 * time.Millisecond
	// mtuMost limits what is sent. A device with a larger MTU leads to this host itself.
	mtuMost = 20_000
)

// tcpiTimestamps is TCPI_OPT_TIMESTAMPS of linux/tcp.h: each segment then has an option of timestampBytes bytes.
const tcpiTimestamps, timestampBytes = 1, 12

// segmentSizes are the sizes that are tried if full segments are lost.
var segmentSizes = []int{1400, 1360, 1300, 1220, 1000, 536}

// mtu sends the proxy a greeting that fills several packets. They have arrived if the kernel of the proxy's host
// acknowledges them; the answer of the proxy does not matter.
func (p *proxy) mtu(ctx context.Context) []Finding {
	full := p.large(ctx, 0)
	switch {
	case full.err != nil:
		return []Finding{{Check: "packet size", Level: NotTested, Found: sentence(full.err)}}
	case full.arrived:
		return []Finding{
			{Check: "packet size", Level: OK, Found: fmt.Sprintf("Full packets of %d bytes of data reach the proxy.", full.mss)},
		}
	}
	sizes := slices.DeleteFunc(slices.Clone(segmentSizes), func(n int) bool { return n >= full.mss })
	arrived := make([]bool, len(sizes))
	var ran sync.WaitGroup
	for i, n := range sizes {
		ran.Go(func() { arrived[i] = p.large(ctx, n).arrived })
	}
	ran.Wait()
	f := Finding{Check: "packet size", Level: Fault,
		Found: fmt.Sprintf(
			"Large packets to the proxy are lost on the way (an MTU black hole): %d bytes of data do not arrive.",
			full.mss,
		),
		Means: "Connections open, and stall as soon as more is sent: HTTPS hangs in the beginning, uploads and BitTorrent stop.",
		Do:    "sysctl -w net.ipv4.tcp_mtu_probing=1 (as root)"}
	if i := slices.Index(arrived, true); i >= 0 {
		size := sizes[i] + full.headers
		f.Found = fmt.Sprintf(
			"Large packets to the proxy are lost on the way (an MTU black hole): packets of %d bytes arrive, those of %d do not.",
			size,
			full.packet,
		)
		if full.device != "" {
			f.Do += fmt.Sprintf(", or ip link set dev %s mtu %d", full.device, size)
		}
	}
	return []Finding{f}
}

// largeResult tells what happened to large packets.
type largeResult struct {
	arrived      bool
	mss, headers int // bytes of data, and of the headers without options; the kernel's segment size leaves room for these headers
	packet       int // with headers and options
	device       string
	err          error
}

// large sends packets with segment bytes of data; 0: as large as the kernel makes them.
func (p *proxy) large(ctx context.Context, segment int) (r largeResult) {
	c, err := p.carrier(ctx, func(fd int) error {
		if segment == 0 {
			return nil
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, segment)
	})
	if err != nil {
		return largeResult{err: err}
	}
	defer c.Close()
	t, ok := c.(*net.TCPConn)
	if !ok {
		return largeResult{err: errors.New("the proxy is not reached by TCP")}
	}
	info, err := tcpInfo(t)
	if err != nil {
		return largeResult{err: err}
	}
	r.mss, r.headers, r.device = int(info.Snd_mss), headersOf(t), deviceOf(t)
	r.packet = r.mss + r.headers
	if info.Options&tcpiTimestamps != 0 {
		r.packet += timestampBytes
	}
	payload := make([]byte, min(max(2*r.mss, 3000), mtuMost))
	copy(payload, []byte{5, 1, 0}) // a greeting of SOCKS5 that offers no login
	t.SetDeadline(time.Now().Add(mtuTime))
	answered, answer := make(chan struct{}), false
	go func() {
		defer close(answered)
		if _, err := t.Read(make([]byte, 64)); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
			answer = true // an answer, a FIN or a RST: the proxy has received the first packet, which was a large one
		}
	}()
	acked := false
	if _, err := t.Write(payload); err == nil {
		acked = p.acknowledged(ctx, t, len(payload), answered)
	}
	t.SetDeadline(time.Unix(1, 0))
	<-answered
	r.arrived = acked || answer
	return r
}

// acknowledged waits until the other side has acknowledged n bytes.
func (p *proxy) acknowledged(ctx context.Context, t *net.TCPConn, n int, answered <-chan struct{}) bool {
	ctx, cancel := context.WithTimeout(ctx, mtuTime)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if info, err := tcpInfo(t); err == nil && info.Bytes_acked >= uint64(n) {
			return true
		}
		select {
		case <-answered:
			return false // the other goroutine has the result
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

func tcpInfo(t *net.TCPConn) (*unix.TCPInfo, error) {
	raw, err := t.SyscallConn()
	if err != nil {
		return nil, err
	}
	var info *unix.TCPInfo
	var ierr error
	err = raw.Control(func(fd uintptr) { info, ierr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err != nil {
		return nil, err
	}
	return info, ierr
}

// headersOf returns the length of the IP and TCP headers of a packet, without options.
func headersOf(t *net.TCPConn) int {
	if a := t.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); a.Is4() || a.Is4In6() {
		return 40
	}
	return 60
}

// deviceOf returns the name of the device that has the local address of the connection, or an empty string if it is
// unknown.
func deviceOf(t *net.TCPConn) string {
	own := t.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	devices, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, d := range devices {
		addrs, _ := d.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == own {
				return d.Name
			}
		}
	}
	return ""
}
