package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

// notifier tells systemd how we are: sd_notify(3), datagrams on the unix socket that NOTIFY_SOCKET names. One without a
// socket tells nobody. Its methods may be called from any goroutine.
type notifier struct {
	conn     *net.UnixConn
	watchdog time.Duration // systemd wants to hear from us this often; 0: it does not
	log      *slog.Logger
}

// sendTimeout bounds one message: a systemd that does not read must not hold us.
const sendTimeout = time.Second

// newNotifier reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID of environ, in the form of os.Environ. An address that
// can't be used is logged and no error: the network matters more.
func newNotifier(environ []string, log *slog.Logger) *notifier {
	n := &notifier{log: log}
	var addr, usec, pid string
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		switch name {
		case "NOTIFY_SOCKET":
			addr = value
		case "WATCHDOG_USEC":
			usec = value
		case "WATCHDOG_PID":
			pid = value
		}
	}
	if addr == "" {
		return n
	}
	conn, err := dialNotify(addr)
	if err != nil {
		log.Warn("cannot notify systemd", "err", err)
		return n
	}
	n.conn = conn
	us, err := strconv.ParseInt(usec, 10, 64)
	if err == nil && us > 0 && us < 1<<50 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		n.watchdog = time.Duration(us) * time.Microsecond
	}
	return n
}

func dialNotify(addr string) (*net.UnixConn, error) {
	if !strings.HasPrefix(addr, "/") && !strings.HasPrefix(addr, "@") {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%q is neither a path nor an abstract name", addr)
	}
	return net.DialUnix("unixgram", nil, &net.UnixAddr{Name: addr, Net: "unixgram"})
}

// send sends assignments, one on a line.
func (n *notifier) send(lines ...string) {
	if n.conn == nil {
		return
	}
	_ = n.conn.SetWriteDeadline(time.Now().Add(sendTimeout))
	if _, err := n.conn.Write([]byte(strings.Join(lines, "\n"))); err != nil && !errors.Is(err, net.ErrClosed) {
		n.log.Warn("cannot notify systemd", "err", err)
	}
}

func status(text string) string { return "STATUS=" + control.Plain(text) }

// ready: the host is steered, or is so again after reloading.
func (n *notifier) ready(text string) { n.send("READY=1", status(text)) }

// reloading: the configuration is read again. ready follows.
func (n *notifier) reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	n.send("RELOADING=1", "MONOTONIC_USEC="+strconv.FormatInt(now.Nano()/1000, 10))
}

// waiting: the start takes longer, and the next word comes within the time given.
func (n *notifier) waiting(text string, within time.Duration) {
	n.send(status(text), "EXTEND_TIMEOUT_USEC="+strconv.FormatInt((2*within).Microseconds(), 10))
}

func (n *notifier) stopping() { n.send("STOPPING=1", status("stopping")) }

// guard tells the watchdog that we live, as often as it wants to hear it and twice more, until ctx ends. Before each time
// it calls alive: what hangs there stops the telling, and systemd ends us.
func (n *notifier) guard(ctx context.Context, alive func()) {
	if n.conn == nil || n.watchdog == 0 {
		return
	}
	tick := time.NewTicker(n.watchdog / 3)
	defer tick.Stop()
	for {
		alive()
		n.send("WATCHDOG=1")
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// close gives the socket back.
func (n *notifier) close() {
	if n.conn != nil {
		n.conn.Close()
	}
}
