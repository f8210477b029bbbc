package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

var cmdCapture = &command{
	name: "capture", args: "[OPTION...] FILE|-", takes: config.Capture,
	short: "write the packets between programs and viasocks to a file, for Wireshark",
	about: `Write what crosses the TUN to FILE, or to standard output, as pcapng, which Wireshark and tshark read. A comment
stands at the first packet of each flow, and at the first after something has happened to it: its program, upstream,
rule, state, and in the end its bytes or why it failed. It ends after 100,000 packets, 100 MiB or one minute, unless
options say otherwise, or when it is interrupted. Packets that cannot be written fast enough are left out and counted;
the traffic does not wait for them.

  sudo viasocks capture --time 10s all.pcapng
  viasocks capture --pid 4711 --destination example.com - | tshark -r -

The file shows whatever programs send without encryption. With --pid, capture a program under 'viasocks run'.`,
	run: func(c *command, args, env []string, std streams) (int, error) {
		return ask(c, args, env, func(cfg *config.Config, client *control.Client) error {
			return capture(cfg, client, std)
		})
	},
}

// capture writes to the file of cfg until the capture is over or the user ends it.
func capture(cfg *config.Config, client *control.Client, std streams) (err error) {
	out := &later{name: cfg.CaptureFile}
	if cfg.CaptureFile == "-" {
		if _, err := unix.IoctlGetTermios(int(std.out.Fd()), unix.TCGETS); err == nil {
			return errors.New("cannot write packets to a terminal: name a file, or pipe them to a program")
		}
		out.f = std.out
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	n, err := client.Capture(ctx, cfg.Capture, out)
	if cfg.CaptureFile != "-" {
		err = errors.Join(err, out.close())
	}
	if errors.Is(err, syscall.EPIPE) { // whoever read it has enough
		err = nil
	}
	if err == nil {
		fmt.Fprintf(std.err, "%d packets\n", n)
	}
	return err
}

// later is a file that is made when there is something to write: an error leaves nothing behind.
type later struct {
	name string
	f    *os.File
}

var _ io.Writer = (*later)(nil)

// Write implements io.Writer.
func (l *later) Write(b []byte) (int, error) {
	if l.f == nil {
		f, err := os.OpenFile(l.name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) // it may show secrets
		if err != nil {
			return 0, err.(*fs.PathError).Err
		}
		l.f = f
	}
	return l.f.Write(b)
}

func (l *later) close() error {
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}
