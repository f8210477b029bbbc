package relay

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"github.com/viasocks/viasocks/stack/flow"
)

// Config of a Loop.
type Config struct {
	IdleTimeout time.Duration // keepalive idle time of upstream sockets; 0: 2 h
	Log         *slog.Logger  // nil: slog.Default
}

// How a relay ended, for errors.Is on Result.Err.
var (
	ErrAppGone       = errors.New("the app was gone")      // before the handshake with it was over
	ErrAppReset      = errors.New("reset by the app")      // RST from the app
	ErrUpstreamReset = errors.New("reset by the upstream") // RST from the upstream, or its socket failed
	ErrAborted       = errors.New("aborted")               // Relay.Abort
	ErrClosed        = errors.New("loop closed")           // the Loop ended
)

// Result is the end of a relay. Up is app to upstream, bytes.
type Result struct {
	Up, Down uint64
	Err      error // nil: both FINs were passed on
}

// Loop is an event loop.
type Loop struct{}

// NewLoop makes a loop; Run runs it.
func NewLoop(Config) (*Loop, error) { return nil, errors.ErrUnsupported }

// Run runs the loop until ctx ends or Close is called.
func (*Loop) Run(ctx context.Context) error { return errors.ErrUnsupported }

// Close ends the loop.
func (*Loop) Close() error { return nil }

// Start answers the held SYN and relays.
func (*Loop) Start(req flow.StreamRequest, fd int, done func(Result)) *Relay { return nil }

// Relay is one TCP flow between the app and an upstream socket.
type Relay struct{}

// Opened implements flow.Listener.
func (*Relay) Opened(flow.Stream, error) {}

// Ready implements flow.Listener.
func (*Relay) Ready(flow.Events) {}

// Bytes moved so far.
func (*Relay) Bytes() (up, down uint64) { return }

// Abort resets both sides.
func (*Relay) Abort() {}

// Codec puts a header before each datagram and takes it off.
type Codec interface {
	// AppendHeader appends the header of a datagram to dst.
	AppendHeader(b []byte, dst netip.AddrPort) []byte
	// ParseHeader returns the source that the header names and the header's length.
	ParseHeader(b []byte) (src netip.AddrPort, n int, err error)
}

// LinkStats counts datagrams.
type LinkStats struct {
	Sent, Received       uint64 // datagrams
	SentBytes, RecvBytes uint64 // payload, without the header
	Full                 uint64 // not sent: the socket's buffer was full
	TooLarge             uint64 // not sent: larger than the encapsulation allows
	Unsendable           uint64 // not sent: wrong family, or the kernel refused
	Malformed            uint64 // received with a bad header
	Unreachable          uint64 // ICMP errors
}

// PacketLink is a UDP socket of an upstream.
type PacketLink interface {
	Send([]flow.Packet) (n int, err error)
	Close() error
	Stats() LinkStats
}

// OpenPackets takes fd.
func (*Loop) OpenPackets(fd int, codec Codec, sink func([]flow.Packet), closed func(error)) (PacketLink, error) {
	return nil, errors.ErrUnsupported
}
