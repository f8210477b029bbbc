package portmap

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

var gateway = netip.MustParseAddrPort("198.18.0.2:1900")

func TestSearch(t *testing.T) {
	const good = "M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nST: %s\r\nMAN: \"ssdp:discover\"\r\nMX: 2\r\n"
	for _, tt := range []struct {
		ask, st string // st: empty if nobody answers
	}{
		{fmt.Sprintf(good, typeIGD) + "\r\n", typeIGD},
		{fmt.Sprintf(good, typeIGD), typeIGD}, // without the empty line
		{fmt.Sprintf(good, "ssdp:all") + "\r\n", typeIGD},
		{fmt.Sprintf(good, "upnp:rootdevice") + "\r\n", "upnp:rootdevice"},
		{fmt.Sprintf(good, serviceIP) + "\r\n", serviceIP},
		{fmt.Sprintf(good, "urn:schemas-upnp-org:device:MediaServer:1") + "\r\n", ""},
		{fmt.Sprintf(good, "") + "\r\n", ""},
		{strings.Replace(fmt.Sprintf(good, typeIGD), "ssdp:discover", "ssdp:alive", 1) + "\r\n", ""},
		{"NOTIFY * HTTP/1.1\r\nST: ssdp:all\r\nMAN: \"ssdp:discover\"\r\n\r\n", ""},
		{fmt.Sprintf(good, typeIGD) + "X: " + strings.Repeat("x", maxSearch) + "\r\n\r\n", ""},
		{"", ""},
	} {
		got := string(New(&fakeBackend{}, epoch).Search([]byte(tt.ask), gateway))
		want := "LOCATION: http://198.18.0.2:1900/rootDesc.xml\r\n"
		right := strings.Contains(got, "\r\nST: "+tt.st+"\r\n") && strings.Contains(got, want)
		if (got != "") != (tt.st != "") || got != "" && !right {
			t.Errorf("%q: %q", tt.ask, got)
		}
	}
}

// soap sends an action with arguments, which alternate with their values, and returns the body and the status.
func soap(ctx context.Context, h http.Handler, service, name string, args ...string) (int, string) {
	body := `<?xml version="1.0"?><s:Envelope xmlns:s="` + soapNS + `"><s:Body><u:` + name + ` xmlns:u="` + service + `">`
	for i := 0; i < len(args); i += 2 {
		body += "<" + args[i] + ">" + args[i+1] + "</" + args[i] + ">"
	}
	body += "</u:" + name + "></s:Body></s:Envelope>"
	r := httptest.NewRequestWithContext(ctx, "POST", "http://198.18.0.2:1900"+pathControlIP, strings.NewReader(body))
	r.RemoteAddr = client.String()
	r.Header.Set("SOAPAction", `"`+service+"#"+name+`"`)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func add(external, internal, to, proto, lease string) []string {
	return []string{"NewRemoteHost", "", "NewExternalPort", external, "NewProtocol", proto, "NewInternalPort", internal,
		"NewInternalClient", to, "NewEnabled", "1", "NewPortMappingDescription", "a &lt;name&gt;", "NewLeaseDuration", lease}
}

// Actions and their errors, by WANIPConnection:1.
func TestActions(t *testing.T) {
	works := fakeBackend{state: Works, address: Works}
	far := fakeBackend{state: Works, outer: netip.MustParseAddrPort("203.0.113.1:9")}
	own := client.Addr().String()
	entry := []string{"NewRemoteHost", "", "NewExternalPort", "7", "NewProtocol", "TCP"}
	for _, tt := range []struct {
		name string
		args []string
		back fakeBackend
		want string
	}{
		{"GetExternalIPAddress", nil, works, "<NewExternalIPAddress>203.0.113.1<"},
		{"GetExternalIPAddress", nil, fakeBackend{address: Failed}, "<errorCode>501<"},
		{"GetStatusInfo", nil, works, "<NewConnectionStatus>Connected<"},
		{"GetStatusInfo", nil, fakeBackend{address: Failed}, "<NewConnectionStatus>Disconnected<"},
		{"AddPortMapping", add("7", "8", own, "TCP", "0"), works, "AddPortMappingResponse"},
		{"AddPortMapping", add("7", "8", own, "TCP", "0"), far, "<errorCode>718<"},
		{"AddAnyPortMapping", add("7", "8", own, "TCP", "0"), far, "<NewReservedPort>9<"},
		{"AddPortMapping", add("7", "8", own, "UDP", "0"), fakeBackend{state: Unsupported}, "<errorCode>501<"},
		{"AddPortMapping", add("7", "8", own, "TCP", "0"), fakeBackend{state: Forbidden}, "<errorCode>606<"},
		{"AddPortMapping", add("7", "8", own, "TCP", "0"), fakeBackend{state: Full}, "<errorCode>728<"},
		{"AddPortMapping", add("7", "8", "198.18.0.9", "TCP", "0"), works, "<errorCode>606<"},
		{"AddPortMapping", add("0", "8", own, "TCP", "0"), works, "<errorCode>402<"},
		{"AddPortMapping", add("7", "0", own, "TCP", "0"), works, "<errorCode>402<"},
		{"AddPortMapping", add("7", "8", own, "SCTP", "0"), works, "<errorCode>402<"},
		{"AddPortMapping", add("7", "65536", own, "TCP", "0"), works, "<errorCode>402<"},
		{"AddPortMapping", entry, works, "<errorCode>402<"},
		{"DeletePortMapping", entry, works, "<errorCode>714<"},
		{"GetSpecificPortMappingEntry", entry, works, "<errorCode>714<"},
		{"GetGenericPortMappingEntry", []string{"NewPortMappingIndex", "0"}, works, "<errorCode>713<"},
		{"GetGenericPortMappingEntry", []string{"NewPortMappingIndex", "-1"}, works, "<errorCode>402<"},
		{"Reboot", nil, works, "<errorCode>401<"},
	} {
		s := New(&tt.back, time.Now())
		code, got := soap(t.Context(), s, serviceIP, tt.name, tt.args...)
		if !strings.Contains(got, tt.want) || (code == http.StatusOK) == strings.Contains(tt.want, "errorCode") {
			t.Errorf("%s %v: %d %s, want %s", tt.name, tt.args, code, got, tt.want)
		}
		if code != http.StatusOK && len(s.ports) > 0 {
			t.Errorf("%s %v failed and left a port", tt.name, tt.args)
		}
		if err := xml.Unmarshal([]byte(got), new(struct{})); err != nil {
			t.Errorf("%s: %v: %s", tt.name, err, got)
		}
	}
}

// A port of UPnP is listed with its description, lives as long as its lease or for ever, and ends by its outer port. One
// that NAT-PMP holds too goes on.
func TestEntries(t *testing.T) {
	back := &fakeBackend{state: Works, outer: netip.MustParseAddrPort("203.0.113.1:7")}
	start := time.Now()
	s := New(back, start)
	ask := func(want, name string, args ...string) {
		t.Helper()
		if _, got := soap(t.Context(), s, serviceIP, name, args...); !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	own := client.Addr().String()
	ask("AddPortMappingResponse", "AddPortMapping", add("7", "8", own, "TCP", "0")...)
	entry := []string{"NewRemoteHost", "", "NewExternalPort", "7", "NewProtocol", "TCP"}
	inner := "<NewInternalPort>8</NewInternalPort><NewInternalClient>" + own + "</NewInternalClient><NewEnabled>1</NewEnabled>" +
		"<NewPortMappingDescription>a &lt;name&gt;</NewPortMappingDescription><NewLeaseDuration>0</NewLeaseDuration>"
	ask(inner, "GetSpecificPortMappingEntry", entry...)
	ask("<NewExternalPort>7</NewExternalPort><NewProtocol>TCP</NewProtocol>"+inner,
		"GetGenericPortMappingEntry", "NewPortMappingIndex", "0")
	s.Expire(start.Add(365 * 24 * time.Hour))
	ask("errorCode>718<", "AddPortMapping", add("77", "8", own, "TCP", "0")...)
	ask(inner, "GetSpecificPortMappingEntry", entry...)
	s.Handle([]byte{0, 2, 0, 0, 0, 8, 0, 7, 0, 0, 0, 60}, client, time.Now())
	ask("DeletePortMappingResponse", "DeletePortMapping", entry...)
	if len(back.unmaps) != 0 {
		t.Errorf("the port of NAT-PMP ended")
	}
	ask("AddPortMappingResponse", "AddPortMapping", add("7", "8", own, "TCP", "600")...)
	s.Expire(time.Now().Add(590 * time.Second))
	if len(back.unmaps) != 0 {
		t.Errorf("the lease ended early")
	}
	s.Expire(time.Now().Add(601 * time.Second))
	if len(back.unmaps) != 1 || len(s.ports) != 0 {
		t.Errorf("the lease did not end: %v", s.ports)
	}
}

// A request waits until the proxy has answered, and leaves no port when its program gives up.
func TestPatientRequest(t *testing.T) {
	back := &fakeBackend{state: Wait}
	s := New(back, time.Now())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan string, 1)
	ask := func(ctx context.Context) {
		_, got := soap(ctx, s, serviceIP, "AddPortMapping", add("7", "8", client.Addr().String(), "TCP", "0")...)
		ended <- got
	}
	asked := func(n int) func() bool {
		return func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(back.maps) >= n }
	}
	go ask(ctx)
	testkit.Eventually(t, "three looks", asked(3))
	cancel()
	<-ended
	if len(s.ports) != 0 || len(back.unmaps) != 1 {
		t.Errorf("the port stays: %v, %v", s.ports, back.unmaps)
	}
	go ask(t.Context())
	testkit.Eventually(t, "more looks", asked(6))
	s.mu.Lock()
	back.state = Works
	s.mu.Unlock()
	if got := <-ended; !strings.Contains(got, "AddPortMappingResponse") {
		t.Error(got)
	}
}

// What a web page in a browser can send is refused, and so is what is no SOAP.
func TestForeignRequests(t *testing.T) {
	s := New(&fakeBackend{state: Works, address: Works}, time.Now())
	get := func(method, host, path, from, body string) int {
		r := httptest.NewRequest(method, "http://"+host+path, strings.NewReader(body))
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w.Code
	}
	const at, own = "198.18.0.2:1900", "198.18.0.1:40000"
	envelope := `<s:Envelope xmlns:s="` + soapNS + `"><s:Body><u:GetExternalIPAddress xmlns:u="` + serviceIP +
		`"/></s:Body></s:Envelope>`
	for _, tt := range []struct {
		method, host, path, from, body string
		want                           int
	}{
		{"GET", at, pathRoot, own, "", 200},
		{"GET", "198.18.0.2", pathIP, own, "", 200},
		{"GET", at, pathCIF, own, "", 200},
		{"GET", "rebound.example:1900", pathRoot, own, "", 403},
		{"GET", at, pathRoot, "[2001:db8::1]:9", "", 403},
		{"GET", at, "/", own, "", 404},
		{"POST", at, "/", own, "", 404},
		{"POST", at, pathControlIP, own, envelope, 500}, // without SOAPAction
		{"POST", at, pathControlIP, own, "x=y", 500},
		{"POST", at, pathControlIP, own, envelope + strings.Repeat(" ", maxBody), 500},
	} {
		if got := get(tt.method, tt.host, tt.path, tt.from, tt.body); got != tt.want {
			t.Errorf("%s %s%s from %s: %d, want %d", tt.method, tt.host, tt.path, tt.from, got, tt.want)
		}
	}
}

// The descriptions are XML, and every argument has its variable.
func TestDescriptions(t *testing.T) {
	for _, text := range []string{New(&fakeBackend{}, epoch).description, scpdOf(actionsIP), scpdOf(actionsCIF)} {
		d := xml.NewDecoder(strings.NewReader(text))
		for {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%v: %s", err, text)
			}
		}
	}
	for _, a := range actionsIP {
		for _, name := range append(a.in, a.out...) {
			if v := "<name>" + strings.TrimPrefix(name, "New") + "</name><dataType>"; strings.Count(scpdOf(actionsIP), v) != 1 {
				t.Errorf("%s has no variable", name)
			}
		}
	}
}

// Nothing that a program sends makes the gateway panic, or keep more than one port.
func FuzzIGD(f *testing.F) {
	f.Add([]byte("M-SEARCH * HTTP/1.1\r\nST: ssdp:all\r\nMAN: \"ssdp:discover\"\r\n\r\n"), "AddPortMapping")
	f.Add([]byte(`<s:Envelope xmlns:s="`+soapNS+`"><s:Body><u:GetGenericPortMappingEntry xmlns:u="`+serviceIP+
		`"><NewPortMappingIndex>0</NewPortMappingIndex></u:GetGenericPortMappingEntry></s:Body></s:Envelope>`),
		"GetGenericPortMappingEntry")
	f.Fuzz(func(t *testing.T, body []byte, name string) {
		s := New(&fakeBackend{state: Works, address: Works}, time.Now())
		if got := s.Search(body, gateway); len(got) > 2*maxSearch {
			t.Fatalf("%d bytes", len(got))
		}
		r := httptest.NewRequest("POST", "http://198.18.0.2:1900"+pathControlIP, strings.NewReader(string(body)))
		r.RemoteAddr = client.String()
		r.Header.Set("SOAPAction", `"`+serviceIP+"#"+name+`"`)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if err := xml.Unmarshal(w.Body.Bytes(), new(struct{})); err != nil || len(s.ports) > 1 {
			t.Fatalf("%v, %d ports: %s", err, len(s.ports), w.Body)
		}
	})
}
