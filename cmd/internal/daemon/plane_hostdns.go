package daemon

import (
	"net"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
)

// hostDNS returns how DNS servers are asked past every proxy. The host's own servers are looked up for each question,
// because the network may change; up: the whole host is carried. prepare marks the sockets so that they are not
// carried; nil: not needed.
func hostDNS(up bool, prepare func(fd int) error) route.HostDNS {
	d := net.Dialer{Control: rawControl(prepare)}
	return route.HostDNS{
		Dial: d.DialContext,
		Servers: func() (all []dns.DirectServer) {
			servers, _ := config.HostServers(up) // config.Parse has warned if there are none
			for _, a := range servers {
				all = append(all, dns.DirectServer{Addr: a})
			}
			return all
		},
	}
}
