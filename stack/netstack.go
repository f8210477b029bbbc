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

// Buffers of one stream, bytes. gVisor grows them as the congestion window (send) and what the relay reads in each
// round trip (receive) grow, so the default is what a stream holds whose other side never moves. Measured against a
// kernel's TUN, 200 apps that never read: 31 MB with this default, 186 MB with 1 MiB, at the same throughput.
//
// The app is always in this machine, so the maxima are what 10 Gbit/s ask for while the scheduler keeps us waiting, and
// not the product of a long path, which the kernel's socket toward the proxy has. Eight downloads fill their send buffers
// whenever the frame reader waits: beside them a small answer waits 8 ms with 1 MiB, 20 ms with 4, 5 ms with 512 KiB, which
// costs one download a tenth. A receive buffer of 1 MiB costs an upload a fifth: 0.75 s/GB against 0.62 with 4.
const (
	minBuffer     = 4 << 10
	defaultBuffer = 256 << 10
	maxSendBuffer = 1 << 20
	maxRecvBuffer = 4 << 20
)

// gVisor logs to stderr by itself, which belongs to the program that runs with us. Nobody else imports it.
func init() { log.SetTarget(noLog{}) }

type noLog struct{}

func (noLog) Emit(int, log.Level, time.Time, string, ...any) {}

// newNetstack makes gVisor's stack over l: it answers for every address (promiscuous) and with every address (spoofing).
func newNetstack(l *link) (*gstack.Stack, error) {
	ns := gstack.New(gstack.Options{
		NetworkProtocols: []gstack.NetworkProtocolFactory{
			l.overIP(ipv4.NewProtocol), l.overIP(ipv6.NewProtocolWithOptions(ipv6.Options{})),
		},
		// UDP only to be reassembled; it has no endpoint.
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := configure(ns, l); err != nil {
		ns.Destroy()
		return nil, err
	}
	return ns, nil
}

func configure(ns *gstack.Stack, l *link) error {
	// RACK's probe fires at twice the round trip without a floor: on a TUN 200 µs, hundreds of needless retransmits.
	recovery := tcpip.TCPRecovery(0)
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	// Nothing wanders on a TUN, and gVisor swallows a SYN that re-uses a tuple in TIME_WAIT.
	timeWait := tcpip.TCPTimeWaitTimeoutOption(0)
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxSendBuffer}
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxRecvBuffer}
	// Not cubic: its HyStart takes the scheduler's delays for a queue and ends slow start at some 47 segments. Then 40 % of
	// the super-segments are cut at the window's edge, and each piece is a frame and an ACK of its own: 0.77 s/GB against
	// 0.66. Nobody shares a TUN, so there is no congestion that anybody should be spared.
	cc := tcpip.CongestionControlOption("reno")
	// No Nagle: the relay writes what it has in one piece, and waiting for more would only add to the delay.
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
