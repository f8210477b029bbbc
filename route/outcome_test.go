package route

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

// The outcome table of the design, row by row.
func TestRefusalOf(t *testing.T) {
	server := func(err error) error { return &socks.ServerError{Server: "socks5://x", Op: socks.OpConnect, Err: err} }
	for _, tt := range []struct {
		err  error
		want flow.Refusal
	}{
		{socks.ReplyGeneralFailure, flow.RefuseReset},
		{socks.ReplyNotAllowed, flow.RefuseAdmin},
		{socks.ReplyNetUnreachable, flow.RefuseNet},
		{socks.ReplyHostUnreachable, flow.RefuseHost},
		{socks.ReplyRefused, flow.RefuseReset},
		{socks.ReplyTTLExpired, flow.RefuseHost},
		{socks.ReplyCommandNotSupported, flow.RefuseNet},
		{socks.ReplyAddrTypeNotSupported, flow.RefuseNet},
		{socks.Reply(9), flow.RefuseReset},
		{socks.Reply(0x5B), flow.RefuseReset},
		{fmt.Errorf("cannot dial: %w", socks.ReplyNotAllowed), flow.RefuseAdmin},
		{fmt.Errorf("%w: %w", socks.ErrLate, socks.ReplyGeneralFailure), flow.RefuseHost},
		{socks.ErrEnded, flow.RefuseReset},
		{socks.ErrSilent, flow.RefuseSilent},
		{server(syscall.ECONNREFUSED), flow.RefuseNet},
		{server(syscall.EHOSTUNREACH), flow.RefuseNet},
		{server(socks.ErrCredentials), flow.RefuseNet},
		{server(context.DeadlineExceeded), flow.RefuseNet},
		{fmt.Errorf("cannot dial: %w", server(socks.ErrMalformed)), flow.RefuseNet},
		{syscall.ECONNREFUSED, flow.RefuseReset},
		{fmt.Errorf("cannot connect: %w", syscall.EHOSTUNREACH), flow.RefuseHost},
		{syscall.ENETUNREACH, flow.RefuseNet},
		{syscall.EACCES, flow.RefuseAdmin},
		{syscall.EPERM, flow.RefuseAdmin},
		{syscall.ETIMEDOUT, flow.RefuseSilent},
		{syscall.EMFILE, flow.RefuseLater},
		{fmt.Errorf("cannot make a socket: %w", syscall.EADDRNOTAVAIL), flow.RefuseLater},
		{&socks.ServerError{Err: syscall.ENOBUFS}, flow.RefuseNet},
		{socks.ErrClosed, flow.RefuseReset},
		{context.Canceled, flow.RefuseReset},
		{errors.New("anything"), flow.RefuseNet},
	} {
		if got := refusalOf(tt.err); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestUDPRefused(t *testing.T) {
	for _, tt := range []struct {
		err   error
		why   flow.Refusal
		final bool
	}{
		{socks.ReplyCommandNotSupported, flow.RefusePort, true},
		{socks.ReplyAddrTypeNotSupported, flow.RefusePort, true},
		{socks.ReplyNotAllowed, flow.RefuseAdmin, true},
		{socks.ReplyGeneralFailure, 0, false},
		{socks.ErrSilent, 0, false},
		{socks.ErrEnded, 0, false},
		{&socks.ServerError{Err: socks.ReplyCommandNotSupported}, 0, false},
	} {
		if why, final := udpRefused(tt.err); why != tt.why || final != tt.final {
			t.Errorf("%v: %v %v", tt.err, why, final)
		}
	}
}
