package socks

import (
	"errors"
	"sync/atomic"

	"github.com/viasocks/viasocks/stack/count"
)

// Counters is the table of the servers' answers; see package count.
type Counters[T any] struct {
	Succeeded            T `metric:"socks_replies_total" label:"reply=succeeded" help:"Replies of SOCKS servers to requests."`
	GeneralFailure       T `metric:"socks_replies_total" label:"reply=general_failure"`
	NotAllowed           T `metric:"socks_replies_total" label:"reply=not_allowed"`
	NetUnreachable       T `metric:"socks_replies_total" label:"reply=network_unreachable"`
	HostUnreachable      T `metric:"socks_replies_total" label:"reply=host_unreachable"`
	Refused              T `metric:"socks_replies_total" label:"reply=connection_refused"`
	TTLExpired           T `metric:"socks_replies_total" label:"reply=ttl_expired"`
	CommandNotSupported  T `metric:"socks_replies_total" label:"reply=command_not_supported"`
	AddrTypeNotSupported T `metric:"socks_replies_total" label:"reply=address_type_not_supported"`
	Unassigned           T `metric:"socks_replies_total" label:"reply=other"`
	// The server closed the connection, or was silent until the handshake timeout, after it had received the request.
	Ended  T `metric:"socks_replies_total" label:"reply=connection_closed"`
	Silent T `metric:"socks_replies_total" label:"reply=none_in_time"`

	// From the start of a dial to the reply, for requests that were granted.
	Handshake count.Histogram[T] `metric:"handshake_seconds" help:"Time until a SOCKS server granted a request, with its connection."`
}

// clientCounters are the counters of one server.
type clientCounters struct{ Counters[atomic.Uint64] }

// refused counts a result that is not a success. Results without a reply, and faults of the server, are none of these.
func (c *clientCounters) refused(err error) {
	var r Reply
	switch {
	case err == ErrEnded:
		c.Ended.Add(1)
		return
	case err == ErrSilent:
		c.Silent.Add(1)
		return
	case !errors.As(err, &r):
		return
	}
	n := &c.Unassigned
	switch r {
	case ReplyGeneralFailure:
		n = &c.GeneralFailure
	case ReplyNotAllowed:
		n = &c.NotAllowed
	case ReplyNetUnreachable:
		n = &c.NetUnreachable
	case ReplyHostUnreachable:
		n = &c.HostUnreachable
	case ReplyRefused:
		n = &c.Refused
	case ReplyTTLExpired:
		n = &c.TTLExpired
	case ReplyCommandNotSupported:
		n = &c.CommandNotSupported
	case ReplyAddrTypeNotSupported:
		n = &c.AddrTypeNotSupported
	}
	n.Add(1)
}

// Counters returns a snapshot of what the servers of the group have answered, in total. Trials, checks and connections for the
// pool send no request and are not counted.
func (g *Group) Counters() (all Counters[uint64]) {
	for _, c := range g.clients {
		count.Add(&all, &c.count.Counters)
	}
	return all
}
