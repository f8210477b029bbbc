package netns

import (
	"context"
	"errors"
	"net/netip"
	"os"
)

// Spec is one program and the network it is to see.
type Spec struct {
	Argv, Env             []string
	Dir                   string // working directory; empty: the caller's
	Stdin, Stdout, Stderr *os.File
	TUN                   TUNOptions
	Addrs                 []netip.Prefix // of the TUN
	Nameserver            []netip.Addr   // for the program's /etc/resolv.conf
	FollowStops           bool           // Wait stops the caller too when the program stops
}

// Child is a program in namespaces of its own.
type Child struct {
	TUN     *os.File // the caller may give it on; Close closes it if nobody did
	TUNName string
	Diag    *Diag // of the program's namespace; Close closes it
	IPv6    bool  // the TUN has its IPv6 addresses
}

// Spawn prepares.
func Spawn(ctx context.Context, s Spec) (*Child, error) { return nil, errors.New("not yet") }

// Exec starts the program.
func (c *Child) Exec() error { return errors.New("not yet") }

// Wait waits for its end.
func (c *Child) Wait() (exit int, err error) { return 0, errors.New("not yet") }

// Signal sends it a signal.
func (c *Child) Signal(sig os.Signal) error { return errors.New("not yet") }

// Close gives everything back.
func (c *Child) Close() error { return nil }

// MainIfChild is the first line of main.
func MainIfChild() {}
