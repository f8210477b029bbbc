package stacktest

import (
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
)

// unreachableErrno returns the errno that Linux derives from a destination unreachable (icmp_err_convert in
// net/ipv4/icmp.c, tab_unreach in net/ipv6/icmp.c). gVisor knows only some of the codes, and two over IPv6.
func unreachableErrno(m ICMP) (unix.Errno, bool) {
	table := []unix.Errno{
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENOPROTOOPT, unix.ECONNREFUSED, unix.EMSGSIZE, unix.EOPNOTSUPP,
		unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET, unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETUNREACH,
		unix.EHOSTUNREACH, unix.EHOSTUNREACH, unix.EHOSTUNREACH, unix.EHOSTUNREACH,
	}
	typ := uint8(3)
	if m.Src.Is6() {
		table = []unix.Errno{
			unix.ENETUNREACH, unix.EACCES, unix.EHOSTUNREACH, unix.EHOSTUNREACH, unix.ECONNREFUSED, unix.EACCES, unix.EACCES,
		}
		typ = 1
	}
	if m.Type != typ || int(m.Code) >= len(table) {
		return 0, false
	}
	return table[m.Code], true
}

// errnos maps gVisor's errors to those of Linux.
var errnos = map[string]unix.Errno{}

func init() {
	for _, e := range []struct {
		err   tcpip.Error
		errno unix.Errno
	}{
		{&tcpip.ErrConnectionRefused{}, unix.ECONNREFUSED},
		{&tcpip.ErrConnectionReset{}, unix.ECONNRESET},
		{&tcpip.ErrConnectionAborted{}, unix.ECONNABORTED},
		{&tcpip.ErrAborted{}, unix.EPIPE},
		{&tcpip.ErrClosedForSend{}, unix.EPIPE},
		{&tcpip.ErrTimeout{}, unix.ETIMEDOUT},
		{&tcpip.ErrNetworkUnreachable{}, unix.ENETUNREACH},
		{&tcpip.ErrHostUnreachable{}, unix.EHOSTUNREACH},
		{&tcpip.ErrNotConnected{}, unix.ENOTCONN},
		{&tcpip.ErrInvalidEndpointState{}, unix.EINVAL},
		{&tcpip.ErrMessageTooLong{}, unix.EMSGSIZE},
		{&tcpip.ErrPortInUse{}, unix.EADDRINUSE},
		{&tcpip.ErrNoPortAvailable{}, unix.EADDRNOTAVAIL},
		{&tcpip.ErrBadLocalAddress{}, unix.EADDRNOTAVAIL},
	} {
		errnos[e.err.String()] = e.errno
	}
}

// sysError returns a gVisor error in the form that the net package gives to one of the kernel.
func sysError(call string, err tcpip.Error) error {
	if errno, ok := errnos[err.String()]; ok {
		return os.NewSyscallError(call, errno)
	}
	return errors.New(err.String())
}

// translate gives an error of gonet the errno that the kernel would return.
func translate(call string, err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Timeout() {
		return err
	}
	if errno, ok := errnos[op.Err.Error()]; ok {
		o := *op
		o.Err = os.NewSyscallError(call, errno)
		return &o
	}
	return err
}
