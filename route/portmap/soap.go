package portmap

import (
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"strings"
)

const (
	maxArgs = 16
	soapNS  = "http://schemas.xmlsoap.org/soap/envelope/"
)

// call is an action with its arguments, as SOAP carries it.
type call struct {
	service, name string
	args          map[string]string
}

var errSOAP = errors.New("not a request of SOAP")

// readCall parses an Envelope with one Body with one action, whose elements are the arguments.
func readCall(r io.Reader) (c call, err error) {
	d := xml.NewDecoder(r)
	depth, c := 0, call{args: map[string]string{}}
	var name string
	var text strings.Builder
	for {
		token, err := d.Token()
		if err == io.EOF && c.name != "" && depth == 0 {
			return c, nil
		} else if err != nil {
			return call{}, errSOAP
		}
		switch t := token.(type) {
		case xml.StartElement:
			depth++
			switch {
			case depth == 1 && t.Name == xml.Name{Space: soapNS, Local: "Envelope"}:
			case depth == 2 && t.Name == xml.Name{Space: soapNS, Local: "Body"}:
			case depth == 3 && c.name == "":
				c.service, c.name = t.Name.Space, t.Name.Local
			case depth == 4 && len(c.args) < maxArgs:
				name = t.Name.Local
				text.Reset()
			default:
				return call{}, errSOAP
			}
		case xml.CharData:
			if depth == 4 {
				text.Write(t)
			}
		case xml.EndElement:
			if depth == 4 {
				c.args[name] = strings.TrimSpace(text.String())
			}
			depth--
		}
	}
}

func writeAnswer(w io.Writer, service string, a *action, out []string) {
	var b strings.Builder
	for i, name := range a.out {
		fmt.Fprintf(&b, "<%s>%s</%[1]s>", name, html.EscapeString(out[i]))
	}
	writeEnvelope(w, fmt.Sprintf(`<u:%sResponse xmlns:u="%s">%s</u:%[1]sResponse>`, a.name, service, b.String()))
}

func writeFault(w http.ResponseWriter, e igdError) {
	w.WriteHeader(http.StatusInternalServerError)
	writeEnvelope(w, fmt.Sprintf(`<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>`+
		`<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>%d</errorCode>`+
		`<errorDescription>%s</errorDescription></UPnPError></detail></s:Fault>`, e.code, e.text))
}

func writeEnvelope(w io.Writer, body string) {
	_, _ = fmt.Fprintf(w, `<?xml version="1.0"?><s:Envelope xmlns:s="%s" `+
		`s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>%s</s:Body></s:Envelope>`, soapNS, body)
}

// describe returns the description of the gateway's devices.
func describe(uuid string) string {
	service := func(kind, id, path, control string) string {
		return fmt.Sprintf(`<serviceList><service><serviceType>%s</serviceType><serviceId>urn:upnp-org:serviceId:%s</serviceId>`+
			`<controlURL>%s</controlURL><eventSubURL>/event</eventSubURL><SCPDURL>%s</SCPDURL></service></serviceList>`,
			kind, id, control, path)
	}
	device := func(kind, suffix, inner string) string {
		return fmt.Sprintf(`<device><deviceType>%s</deviceType><friendlyName>viasocks</friendlyName>`+
			`<manufacturer>viasocks</manufacturer><modelName>viasocks</modelName><UDN>%s%s</UDN>%s</device>`,
			kind, uuid, suffix, inner)
	}
	list := func(inner string) string { return "<deviceList>" + inner + "</deviceList>" }
	conn := device(typeConn, "-2", service(serviceIP, "WANIPConn1", pathIP, pathControlIP))
	wan := device(typeWAN, "-1", service(serviceCIF, "WANCommonIFC1", pathCIF, pathControl)+list(conn))
	return `<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor>` +
		`</specVersion>` + device(typeIGD, "", list(wan)) + `</root>`
}

// scpdOf returns the description of a service.
func scpdOf(actions []action) string {
	var b, vars strings.Builder
	seen := map[string]bool{}
	argument := func(name, way string) {
		variable := strings.TrimPrefix(name, "New")
		fmt.Fprintf(&b, `<argument><name>%s</name><direction>%s</direction>`+
			`<relatedStateVariable>%s</relatedStateVariable></argument>`, name, way, variable)
		if !seen[variable] {
			seen[variable] = true
			fmt.Fprintf(&vars, `<stateVariable sendEvents="no"><name>%s</name><dataType>%s</dataType></stateVariable>`,
				variable, typeOf(variable))
		}
	}
	b.WriteString(`<?xml version="1.0"?><scpd xmlns="urn:schemas-upnp-org:service-1-0"><specVersion><major>1</major>` +
		`<minor>0</minor></specVersion><actionList>`)
	for _, a := range actions {
		fmt.Fprintf(&b, `<action><name>%s</name><argumentList>`, a.name)
		for _, name := range a.in {
			argument(name, "in")
		}
		for _, name := range a.out {
			argument(name, "out")
		}
		b.WriteString(`</argumentList></action>`)
	}
	return b.String() + `</actionList><serviceStateTable>` + vars.String() + `</serviceStateTable></scpd>`
}

func typeOf(variable string) string {
	switch variable {
	case "ExternalPort", "InternalPort", "PortMappingIndex", "ReservedPort":
		return "ui2"
	case "LeaseDuration", "Uptime", "Layer1UpstreamMaxBitRate", "Layer1DownstreamMaxBitRate":
		return "ui4"
	case "Enabled":
		return "boolean"
	}
	return "string"
}
