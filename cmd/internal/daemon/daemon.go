package daemon

import (
	"errors"
	"os"

	"github.com/viasocks/viasocks/cmd/internal/config"
)

// ErrDied: it had started, and then failed.
var ErrDied = errors.New("died while running")

// Run runs one program.
func Run(cfg *config.Config, env []string, stdin, stdout, stderr *os.File) (exit int, err error) {
	return 0, errors.ErrUnsupported
}

// Up steers the whole host.
func Up(cfg *config.Config, stderr *os.File) error { return errors.ErrUnsupported }
