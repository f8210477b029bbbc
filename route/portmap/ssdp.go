package portmap

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"net/textproto"
	"strings"
)

// SSDPPort is the UDP port at which gateways are searched for (UPnP Device Architecture 1.0, section 1), and the TCP port at
// which ours describes itself.
const SSDPPort = 1900

// maxSearch limits a search. Real ones have 100 to 300 bytes.
const maxSearch = 1024

// The types of the gateway's devices and services.
const (
	typeIGD    = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
	typeWAN    = "urn:schemas-upnp-org:device:WANDevice:1"
	typeConn   = "urn:schemas-upnp-org:device:WANConnectionDevice:1"
	serviceIP  = "urn:schemas-upnp-org:service:WANIPConnection:1"
	serviceCIF = "urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1"
)

// Search answers a search for gateways by SSDP. gateway is where ServeHTTP answers. It returns nil if msg is no search, or one
// for something else.
func (s *Server) Search(msg []byte, gateway netip.AddrPort) (reply []byte) {
	target, ok := parseSearch(msg)
	switch {
	case !ok:
		s.mu.Lock()
		s.count.Malformed++
		s.mu.Unlock()
		return nil
	case target == "ssdp:all":
		target = typeIGD
	}
	name := s.uuid + "::" + target
	switch target {
	case "upnp:rootdevice", typeIGD, typeWAN, typeConn, serviceIP, serviceCIF:
	case s.uuid:
		name = s.uuid
	default:
		return nil
	}
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nEXT:\r\nLOCATION: http://%v%s\r\n"+
		"SERVER: Linux UPnP/1.0 viasocks/1\r\nST: %s\r\nUSN: %s\r\n\r\n", gateway, pathRoot, target, name)
}

// parseSearch returns what is searched for.
func parseSearch(msg []byte) (target string, ok bool) {
	if len(msg) > maxSearch {
		return "", false
	}
	line, rest, ok := bytes.Cut(msg, []byte("\r\n"))
	if !ok || string(line) != "M-SEARCH * HTTP/1.1" {
		return "", false
	}
	// Some programs leave out the empty line at the end.
	all := bufio.NewReader(bytes.NewReader(append(rest[:len(rest):len(rest)], "\r\n\r\n"...)))
	h, err := textproto.NewReader(all).ReadMIMEHeader()
	if err != nil || strings.Trim(h.Get("Man"), `"`) != "ssdp:discover" {
		return "", false
	}
	target = h.Get("St")
	return target, target != ""
}
