package resolved

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	service    = "org.freedesktop.resolve1"
	objectPath = dbus.ObjectPath("/org/freedesktop/resolve1")
	manager    = service + ".Manager."
	link       = service + ".Link."

	defaultBus = "unix:path=/run/dbus/system_bus_socket"
	// dialTimeout limits connecting to the bus, including authentication; callTimeout limits one call.
	dialTimeout = 3 * time.Second
	callTimeout = 3 * time.Second
)

// errAbsent means that systemd-resolved is not on the bus.
var errAbsent = errors.New("systemd-resolved does not run")

// server and domain are what the interface calls a(iay) and a(sb).
type server struct {
	Family  int32
	Address []byte
}

type domain struct {
	Name      string
	RouteOnly bool
}

// everything is the domain "~.", which means all names and no search list.
var everything = []domain{{".", true}}

// bus is a connection to the system bus.
type bus struct {
	conn  *dbus.Conn
	end   context.CancelCauseFunc
	owner chan struct{} // signals that systemd-resolved started, ended, or was restarted
}

// SystemBus returns the address of the system bus: DBUS_SYSTEM_BUS_ADDRESS if that is a unix socket, or the usual
// address. Other kinds of addresses are not used, because they can start programs or lead over the network.
func SystemBus() string {
	if a := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); strings.HasPrefix(a, "unix:") {
		return a
	}
	return defaultBus
}

// dial connects to the bus at address. ctx limits only the connecting. The caller closes the bus.
func dial(ctx context.Context, address string) (*bus, error) {
	life, end := context.WithCancelCause(context.Background())
	b := &bus{owner: make(chan struct{}, 1), end: end}
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, errors.New("it does not answer"))
	defer cancel()
	// Only the end of the connection's context ends an authentication that hangs.
	waiting := context.AfterFunc(ctx, func() { end(context.Cause(ctx)) })
	conn, err := dbus.Connect(address, dbus.WithContext(life), dbus.WithSignalHandler(b))
	if err == nil {
		b.conn = conn
		err = b.call(life, conn.BusObject(), "org.freedesktop.DBus.AddMatch",
			"type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',arg0='"+service+"'").Err
	}
	if !waiting() {
		err = context.Cause(life)
	}
	if err != nil {
		end(nil)
		return nil, fmt.Errorf("cannot use the system bus %s: %w", address, err)
	}
	return b, nil
}

// DeliverSignal makes bus the signal handler of its connection. Any process on the bus may send us signals, which
// must not accumulate.
func (b *bus) DeliverSignal(_, _ string, s *dbus.Signal) {
	if s.Name != "org.freedesktop.DBus.NameOwnerChanged" || s.Sender != "org.freedesktop.DBus" {
		return
	}
	select {
	case b.owner <- struct{}{}:
	default: // one is already waiting
	}
}

func (b *bus) close() {
	_ = b.conn.Close()
	b.end(nil)
}

func (b *bus) call(ctx context.Context, o dbus.BusObject, method string, args ...any) *dbus.Call {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return o.CallWithContext(ctx, method, dbus.FlagNoAutoStart, args...)
}

// manage calls a method of systemd-resolved without starting the service.
func (b *bus) manage(ctx context.Context, method string, args ...any) *dbus.Call {
	return b.call(ctx, b.conn.Object(service, objectPath), manager+method, args...)
}

// runs returns the name of systemd-resolved's process on the bus, which changes with the process, or errAbsent.
func (b *bus) runs(ctx context.Context) (owner string, err error) {
	err = b.call(ctx, b.conn.BusObject(), "org.freedesktop.DBus.GetNameOwner", service).Store(&owner)
	if isError(err, "org.freedesktop.DBus.Error.NameHasNoOwner") {
		err = errAbsent
	}
	return owner, err
}

// told reports whether systemd-resolved asks exactly these servers for all names at the device.
func (b *bus) told(ctx context.Context, index int, servers []server) (bool, error) {
	var path dbus.ObjectPath
	if err := b.manage(ctx, "GetLink", int32(index)).Store(&path); err != nil {
		return false, err
	}
	o := b.conn.Object(service, path)
	var haveServers []server
	var haveDomains []domain
	for name, to := range map[string]any{"DNS": &haveServers, "Domains": &haveDomains} {
		var v dbus.Variant
		err := b.call(ctx, o, "org.freedesktop.DBus.Properties.Get", strings.TrimSuffix(link, "."), name).Store(&v)
		if err == nil {
			err = v.Store(to)
		}
		if err != nil {
			return false, fmt.Errorf("cannot read %s of the device: %w", name, err)
		}
	}
	return equal(haveServers, servers) && len(haveDomains) == 1 && haveDomains[0] == everything[0], nil
}

func equal(a, b []server) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Family != b[i].Family || string(a[i].Address) != string(b[i].Address) {
			return false
		}
	}
	return true
}

// tell makes systemd-resolved ask these servers for all names at the device.
func (b *bus) tell(ctx context.Context, index int, servers []server) error {
	i := int32(index)
	for _, c := range []struct {
		method string
		need   bool // methods that older versions lack are not needed
		arg    any
	}{
		// Questions must not be encrypted or validated: the server is this process, and addresses that stand for
		// names have no signatures. LLMNR and multicast DNS reach no host on the TUN, and would delay single-label
		// names.
		{"SetLinkDNSOverTLS", false, "no"},
		{"SetLinkDNSSEC", false, "no"},
		{"SetLinkLLMNR", false, "no"},
		{"SetLinkMulticastDNS", false, "no"},
		{"SetLinkDNS", true, servers},
		{"SetLinkDefaultRoute", false, true},
		{"SetLinkDomains", true, everything},
	} {
		err := b.manage(ctx, c.method, i, c.arg).Err
		if err != nil && (c.need || !isError(err, "org.freedesktop.DBus.Error.UnknownMethod")) {
			return fmt.Errorf("%s: %w", c.method, err)
		}
	}
	return b.flush(ctx)
}

// revert makes systemd-resolved forget the settings for the device.
func (b *bus) revert(ctx context.Context, index int) error {
	if err := b.manage(ctx, "RevertLink", int32(index)).Err; err != nil && !isError(err, service+".NoSuchLink") {
		return err
	}
	return b.flush(ctx)
}

// flush drops answers from before the change of servers.
func (b *bus) flush(ctx context.Context) error { return b.manage(ctx, "FlushCaches").Err }

func isError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}

// wentAway reports whether err means that systemd-resolved, or the bus, ended during a call.
func wentAway(err error) bool {
	const prefix = "org.freedesktop.DBus.Error."
	return errors.Is(err, dbus.ErrClosed) || errors.Is(err, io.EOF) || isError(err, prefix+"ServiceUnknown") ||
		isError(err, prefix+"NameHasNoOwner") || isError(err, prefix+"NoReply") || isError(err, prefix+"Disconnected")
}

func toServers(addrs []netip.Addr) (out []server) {
	for _, a := range addrs {
		family := int32(unix.AF_INET)
		if a.Is6() {
			family = unix.AF_INET6
		}
		out = append(out, server{family, a.AsSlice()})
	}
	return out
}
