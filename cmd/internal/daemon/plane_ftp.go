package daemon

import (
	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
)

// activeFTP returns the settings of --ftp-active, or nil if FTP passes unchanged.
func (p *plane) activeFTP(cfg *config.Config) *route.ActiveFTP {
	if len(cfg.FTPActive) == 0 {
		return nil
	}
	return &route.ActiveFTP{Ports: cfg.FTPActive, Open: p.stack.Open}
}
