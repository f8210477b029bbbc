package daemon

import (
	"fmt"
	"io"
	"os"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/keeper"
	"github.com/viasocks/viasocks/cmd/internal/target"
)

// Detach is Down for the network namespace that cfg names: it stops the `attach` that steers it, if one is alive, and
// undoes what is left. It writes what it did to out.
func Detach(cfg *config.Config, environ []string, out io.Writer, stderr *os.File) error {
	cfg = withStateDir(cfg, environ)
	t, err := target.Find(cfg)
	if err != nil {
		return err
	}
	defer t.Close()
	if path := control.PathIn(cfg.StateDir, t.ID().Ino); control.Locked(path) {
		if err := stopDaemon(path); err != nil {
			return err
		}
		fmt.Fprintln(out, "viasocks has stopped")
	}
	k, err := keeper.Start(t.Namespace, stderr)
	if err != nil {
		return err
	}
	defer k.Close()
	lines, err := k.Clean(&keeper.Order{Kernel: attachedKernel(cfg), LogLevel: cfg.LogLevel})
	for _, l := range lines {
		fmt.Fprintln(out, control.Plain(l))
	}
	return err
}
