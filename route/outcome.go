package route

import (
	"context"
	"errors"
	"os"
	"syscall"

	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
)

// errNoRule is the logged reason for a flow for which no upstream was asked.
var errNoRule = errors.New("no rule matches and there is no default")

// refusalOf returns how the app's connect() ends if the dial ended with err: as it would have ended if the app itself
// had dialled. For SOCKS, this is the server's answer. If no server works, the network is unreachable, which lets
// IPv6 fall back to IPv4 at once. An errno comes from a direct dial.
func refusalOf(err error) flow.Refusal {
	var reply socks.Reply
	var server *socks.ServerError
	var errno syscall.Errno
	switch {
	case errors.As(err, &server): // first, because what it wraps is about the server and not about the target
		return flow.RefuseNet
	case errors.Is(err, socks.ErrLate):
		return flow.RefuseHost
	case errors.Is(err, socks.ErrEnded):
		return flow.RefuseReset
	case errors.As(err, &reply):
		return refusalOfReply(reply)
	case isShortage(err):
		return flow.RefuseLater
	case errors.Is(err, socks.ErrSilent):
		return flow.RefuseSilent
	case errors.Is(err, context.Canceled), errors.Is(err, socks.ErrClosed):
		return flow.RefuseReset // we are ending, and the app must not wait for us
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return flow.RefuseSilent
	case errors.As(err, &errno):
		switch errno {
		case syscall.ECONNREFUSED, syscall.ECONNRESET:
			return flow.RefuseReset
		case syscall.EHOSTUNREACH, syscall.EHOSTDOWN:
			return flow.RefuseHost
		case syscall.EACCES, syscall.EPERM:
			return flow.RefuseAdmin
		case syscall.ETIMEDOUT:
			return flow.RefuseSilent
		}
	}
	return flow.RefuseNet
}

func refusalOfReply(r socks.Reply) flow.Refusal {
	switch r.Plain() {
	case socks.ReplyNotAllowed:
		return flow.RefuseAdmin
	case socks.ReplyNetUnreachable:
		return flow.RefuseNet
	case socks.ReplyHostUnreachable, socks.ReplyTTLExpired:
		// dante and microsocks send 6 when the target timed out. An early error is better than ETIMEDOUT two minutes
		// later.
		return flow.RefuseHost
	case socks.ReplyCommandNotSupported, socks.ReplyAddrTypeNotSupported:
		return flow.RefuseNet
	}
	return flow.RefuseReset // 5, 1, and values that RFC 1928 leaves unassigned
}

// isServerFault reports whether err is a fault of the upstream and not of a target.
func isServerFault(err error) bool {
	var server *socks.ServerError
	return errors.As(err, &server)
}

// udpRefused reports whether err is a server's final answer to UDP ASSOCIATE, and how to refuse each datagram.
func udpRefused(err error) (flow.Refusal, bool) {
	var reply socks.Reply
	if isServerFault(err) || !errors.As(err, &reply) {
		return 0, false
	}
	switch reply {
	case socks.ReplyCommandNotSupported, socks.ReplyAddrTypeNotSupported:
		return flow.RefusePort, true
	case socks.ReplyNotAllowed:
		return flow.RefuseAdmin, true
	}
	return 0, false
}
