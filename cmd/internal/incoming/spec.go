package incoming

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/route/portmap"
)

// Spec is a port of the program at which peers shall reach it.
type Spec struct {
	Port     uint16        // 0: the ports that the program asks for; see Auto
	Upstream string        // empty: the default
	Proto    portmap.Proto // 0: TCP, and UDP as well if the program asks for it
}

// String returns the Spec in the form that Parse takes.
func (s Spec) String() string {
	text := strconv.Itoa(int(s.Port))
	switch {
	case s.Auto():
		text = auto
	case s.Proto != 0:
		text += "/" + s.Proto.String()
	}
	if s.Upstream != "" {
		text += "=" + s.Upstream
	}
	return text
}

// auto stands for the ports that programs ask for.
const auto = "auto"

// Auto reports whether s stands for the ports that the program asks its gateway for.
func (s Spec) Auto() bool { return s.Port == 0 }

// Overlaps reports whether s and o are about the same port of the same protocol. A Spec without a protocol is about TCP here.
func (s Spec) Overlaps(o Spec) bool {
	return s.Port == o.Port && (s.Proto == portmap.UDP) == (o.Proto == portmap.UDP)
}

// Parse parses PORT[/tcp|/udp][=UPSTREAM] and auto[=UPSTREAM].
func Parse(text string) (Spec, error) {
	port, up, named := strings.Cut(text, "=")
	if named && up == "" {
		return Spec{}, errors.New("the name of the upstream is missing")
	}
	if port == auto {
		return Spec{Upstream: up}, nil
	}
	s := Spec{Upstream: up}
	number, proto, has := strings.Cut(port, "/")
	switch {
	case has && proto == "udp":
		s.Proto = portmap.UDP
	case has && proto == "tcp":
		s.Proto = portmap.TCP
	case has:
		return Spec{}, fmt.Errorf("%q is not tcp or udp", proto)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return Spec{}, fmt.Errorf("%q is not a port: write a number from 1 to 65535", number)
	}
	s.Port = uint16(n)
	return s, nil
}
