package stack

import (
	"fmt"
	"time"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const nicID = 1

// Buffer sizes of one stream in bytes. gVisor grows them with the congestion window (send) and with what the relay
// reads in each round trip (receive), so the default is what a stream holds whose other side never reads. Measured
// against a kernel's TUN with 200 apps that never read: 31 MB with this default, 186 MB with 1 MiB, at the same
// throughput.
//
// The app is always on this machine. The maxima are therefore what 10 Gbit/s need while the scheduler keeps us
// waiting, not the bandwidth-delay product of a long path, which the kernel's socket to the proxy has. Eight
// downloads fill their send buffers whenever the frame reader waits; a small answer beside them then waits 8 ms with
// 1 MiB, 20 ms with 4, and 5 ms with 512 KiB, which costs one download a tenth. A receive buffer of 1 MiB costs an
// upload a fifth: 0.75 s/GB instead of 0.62 with 4 MiB.
const (
	minBuffer     = 4 << 10
	defaultBuffer = 256 << 10
	maxSendBuffer = 1 << 20
	maxRecvBuffer = 4 << 20
)

// gVisor logs to stderr by itself, which belongs to the program that we run. No other package imports its log.
func init() { log.SetTarget(noLog{}) }

type noLog struct{}

func (noLog) Emit(int, log.Level, time.Time, string, ...any) {}

// newNetstack makes gVisor's stack over l. It accepts packets to every address (promiscuous) and sends from every
// address (spoofing).
func newNetstack(l *link) (*gstack.Stack, error) {
	ns := gstack.New(gstack.Options{
		NetworkProtocols: []gstack.NetworkProtocolFactory{
			l.overIP(ipv4.NewProtocol), l.overIP(ipv6.NewProtocolWithOptions(ipv6.Options{})),
		},
		// UDP is here only for reassembly; it has no endpoint.
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := configure(ns, l); err != nil {
		ns.Destroy()
		return nil, err
	}
	return ns, nil
}

func configure(ns *gstack.Stack, l *link) error {
	// RACK's probe fires at twice the round trip without a lower limit. On a TUN that is 200 µs and causes hundreds
	// of needless retransmits.
	recovery := tcpip.TCPRecovery(0)
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	// No segment can be delayed on a TUN, and gVisor ignores a SYN that reuses a tuple in TIME_WAIT.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(0)
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxSendBuffer}
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxRecvBuffer}
	// Not cubic: its HyStart takes the scheduler's delays for a queue and ends slow start at about 47 segments. 40 %
	// of the super-segments are then cut at the edge of the window, and each piece is a frame with its own ACK: 0.77
	// s/GB instead of 0.66. No other host shares a TUN, so there is no congestion to avoid.
	cc := tcpip.CongestionControlOption("reno")
	// No Nagle: the relay writes what it has in one piece, and waiting for more would only add delay.
	delay := tcpip.TCPDelayEnabled(false)
	for _, o := range []tcpip.SettableTransportProtocolOption{&recovery, &sack, &moderate, &timeWait, &snd, &rcv, &cc, &delay} {
		if err := ns.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("cannot set up the TCP stack: %T: %v", o, err)
		}
	}
	if err := ns.CreateNICWithOptions(nicID, l, gstack.NICOptions{QDisc: l}); err != nil {
		return fmt.Errorf("cannot attach the device to the stack: %v", err)
	}
	if err := ns.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("cannot make the stack take every address: %v", err)
	}
	if err := ns.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("cannot make the stack answer with every address: %v", err)
	}
	ns.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return nil
}
