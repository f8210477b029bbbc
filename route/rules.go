package route

import (
	"fmt"
	"strconv"
	"strings"

	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
)

// Action is what a rule decides about a flow.
type Action uint8

const (
	ActionVia    Action = iota // carried by the upstream that the rule names
	ActionReject               // refused with an error that the app sees at once: RST, or ICMP port unreachable
	ActionDrop                 // no answer: the app's own timer decides
)

// DirectName is the name of the upstream that the verdict `direct` means.
const DirectName = "direct"

// Limits on the text of a rule. Longer ones were not written by a person, and each limits the work for a flow.
const (
	maxRuleText = 4096
	maxRuleList = 256 // values of one condition
	maxNameLen  = 64
)

// Rule is a line of policy. The rules of a Router are tried in order, and the first that matches decides.
//
//	rule      = { ["not"] condition } verdict
//	condition = "proto" ("tcp" | "udp")
//	          | "src" cidr {"," cidr} | "dst" cidr {"," cidr}
//	          | "name" pattern {"," pattern}
//	          | "list=" FILE
//	          | "port" ports {"," ports}
//	          | "user" user {"," user}
//	          | "cgroup" PATH {"," PATH}
//	          | "exe" PATH {"," PATH}
//	verdict   = "via" NAME | "direct" | "reject" | "drop"
//	cidr      = an IPv4 or IPv6 network in CIDR form, or one address
//	pattern   = example.com (this name) | .example.com (it and every name below it) | img*.example.??? (a pattern)
//	ports     = N | N-M, of the destination
//	user      = a name, or UID, or UID-UID
//
// Conditions may come in any order, each at most once, and all must hold. A rule without conditions matches every
// flow. "not" inverts the condition after it. src is the app's address. FILE contains one network, address or name on
// each line (see list); a name there also means every name below it. A control group is given by its path below the
// root of version 2, and includes all groups below it. PATH of exe is the absolute path of the program, in which *
// stands for any text and ? for any character. NAME is that of an upstream: a letter or digit, then letters, digits,
// '.', '_' and '-'.
//
// An unknown property of a flow meets no condition: a flow without a name matches no pattern, and therefore matches
// "not name". The same holds for the owner of a socket if it cannot be found. The zero Rule is not valid.
type Rule struct {
	not      kinds
	proto    flow.Proto // 0: any
	prefixes []netip.Prefix
	ports    []portRange
	rest     *rest // conditions that few rules have; nil: none

	action Action
	via    string // ActionVia: the upstream's name
	text   string // the result of String
}

// rest contains the conditions that need more than protocol and destination.
type rest struct {
	kinds  kinds // the conditions that are present
	src    []netip.Prefix
	names  []namePattern
	list   *list
	users  []userRange
	groups []string
	exes   []string
}

type portRange struct{ lo, hi uint16 }

// kinds is a set of kinds of conditions.
type kinds uint16

const (
	ofProto kinds = 1 << iota
	ofSource
	ofDest
	ofName
	ofList
	ofPort
	ofUser
	ofCgroup
	ofExe

	ofOwner = ofUser | ofCgroup | ofExe
)

// conditions are the words of the rules, in the order in which String writes them.
var conditions = []struct {
	word  string
	kind  kinds
	want  string // what must follow the word
	parse func(r *Rule, arg string) error
}{
	{"proto", ofProto, "tcp or udp", func(r *Rule, arg string) (err error) { r.proto, err = parseProto(arg); return err }},
	{"src", ofSource, "a network such as 192.0.2.0/24, or several with commas between",
		func(r *Rule, arg string) (err error) { r.more(ofSource).src, err = parsePrefixes(arg); return err }},
	{"dst", ofDest, "a network such as 192.0.2.0/24, or several with commas between",
		func(r *Rule, arg string) (err error) { r.prefixes, err = parsePrefixes(arg); return err }},
	{"name", ofName, "a name such as example.com, or .example.com for every name below it, too",
		func(r *Rule, arg string) (err error) { r.more(ofName).names, err = parsePatterns(arg); return err }},
	{"port", ofPort, "a port such as 443, or 80,6881-6889",
		func(r *Rule, arg string) (err error) { r.ports, err = parsePorts(arg); return err }},
	{"user", ofUser, "a user's name or number, or a range such as 1000-1999",
		func(r *Rule, arg string) (err error) { r.more(ofUser).users, err = parseUsers(arg); return err }},
	{"cgroup", ofCgroup, "the path of a control group, such as system.slice/foo.service",
		func(r *Rule, arg string) (err error) { r.more(ofCgroup).groups, err = parseGroups(arg); return err }},
	{"exe", ofExe, "the path of a program, such as /usr/bin/curl",
		func(r *Rule, arg string) (err error) { r.more(ofExe).exes, err = parseExes(arg); return err }},
}

const listWord = "list="

// more adds a condition of kind k to r's rest, and returns the rest.
func (r *Rule) more(k kinds) *rest {
	if r.rest == nil {
		r.rest = &rest{}
	}
	r.rest.kinds |= k
	return r.rest
}

// Action returns what the rule decides.
func (r *Rule) Action() Action { return r.action }

// Via returns the name of the rule's upstream. It is empty unless the Action is ActionVia.
func (r *Rule) Via() string { return r.via }

// AsksOwner reports whether the rule needs the owner of the app's socket.
func (r *Rule) AsksOwner() bool { return r.rest != nil && r.rest.kinds&ofOwner != 0 }

// List returns the file that the rule names; empty: none.
func (r *Rule) List() string {
	if r.rest == nil || r.rest.list == nil {
		return ""
	}
	return r.rest.list.path
}

// String returns the rule in its shortest form. ParseRule parses it back to the same rule.
func (r *Rule) String() string { return r.text }

// ParseRule parses one rule, and reads the file that it may name, which is not read again later. An error tells which
// word is wrong and what to write instead.
func ParseRule(s string) (Rule, error) { return parseRule(s, loadList) }

func parseRule(s string, load func(path string) (*list, error)) (Rule, error) {
	var r Rule
	if err := r.parse(s, load); err != nil {
		return Rule{}, fmt.Errorf("cannot use rule %q: %w", clip(s), err)
	}
	r.text = r.format()
	return r, nil
}

func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}

// ruleWords are the remaining words of a rule.
type ruleWords []string

// next returns the word after the word after; want describes what must be there.
func (w *ruleWords) next(after, want string) (string, error) {
	if len(*w) == 0 {
		return "", fmt.Errorf("it ends after %q: write %s", after, want)
	}
	word := (*w)[0]
	*w = (*w)[1:]
	return word, nil
}

func (r *Rule) parse(s string, load func(path string) (*list, error)) error {
	if len(s) > maxRuleText {
		return fmt.Errorf("it has %d bytes, the limit is %d: write several rules", len(s), maxRuleText)
	}
	words := ruleWords(strings.Fields(s))
	var seen kinds
	for len(words) > 0 {
		w, _ := words.next("", "")
		not := w == "not"
		if not {
			var err error
			if w, err = words.next(w, "a condition"); err != nil {
				return err
			}
		}
		decided, err := r.verdict(w, &words)
		switch {
		case decided && not:
			return fmt.Errorf(`"not" stands before %q: it belongs before a condition`, w)
		case err != nil:
			return err
		case decided && len(words) > 0:
			return fmt.Errorf("%q comes after the verdict: conditions go before it", clip(words[0]))
		case decided:
			return nil
		}
		k, err := r.condition(w, &words, load)
		if err != nil {
			return err
		}
		if seen&k != 0 {
			return fmt.Errorf("%q is there twice: give its values in one list with commas, or write two rules", w)
		}
		seen |= k
		if not {
			r.not |= k
		}
	}
	return fmt.Errorf("it has no verdict: end it with via NAME, direct, reject or drop")
}

// verdict parses the verdict that begins with w, if it is one.
func (r *Rule) verdict(w string, words *ruleWords) (decided bool, err error) {
	switch w {
	case "via":
		if r.via, err = words.next(w, "the name of an upstream"); err == nil {
			err = CheckName(r.via)
		}
	case DirectName:
		r.via = DirectName
	case "reject":
		r.action = ActionReject
	case "drop":
		r.action = ActionDrop
	default:
		return false, nil
	}
	return true, err
}

// condition parses the condition that begins with w.
func (r *Rule) condition(w string, words *ruleWords, load func(path string) (*list, error)) (k kinds, err error) {
	if path, ok := strings.CutPrefix(w, listWord); ok {
		r.more(ofList).list, err = load(path)
		return ofList, err
	}
	for _, c := range conditions {
		if c.word != w {
			continue
		}
		arg, err := words.next(w, c.want)
		if err != nil {
			return 0, err
		}
		return c.kind, c.parse(r, arg)
	}
	return 0, fmt.Errorf("unknown word %q: conditions are proto, src, dst, name, list=FILE, port, user, cgroup and exe; "+
		"verdicts are via NAME, direct, reject and drop", clip(w))
}

// CheckName returns an error unless an upstream may have the name s: it must be one word of a rule that has no other
// meaning there.
func CheckName(s string) error {
	ok := s != "" && len(s) <= maxNameLen
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '.' || c == '_' || c == '-')
	}
	if !ok {
		return fmt.Errorf("upstream name %q: write letters, digits, '.', '_' and '-', a letter or digit first, at most %d",
			clip(s), maxNameLen)
	}
	switch s {
	case "reject", "drop", "via":
		return fmt.Errorf("upstream name %q is a word of the rules: choose another", s)
	}
	return nil
}

func (r *Rule) format() string {
	var b strings.Builder
	for _, c := range conditions {
		if c.kind == ofPort { // the list is written before it
			r.formatCondition(&b, ofList, listWord)
		}
		r.formatCondition(&b, c.kind, c.word+" ")
	}
	b.WriteString(r.Verdict())
	return b.String()
}

// Verdict returns what the rule decides, as it is written.
func (r *Rule) Verdict() string {
	switch {
	case r.action == ActionReject:
		return "reject"
	case r.action == ActionDrop:
		return "drop"
	case r.via == DirectName:
		return DirectName
	}
	return "via " + r.via
}

// formatCondition writes r's condition of kind k, if it has one.
func (r *Rule) formatCondition(b *strings.Builder, k kinds, word string) {
	values := r.values(k)
	if len(values) == 0 {
		return
	}
	if r.not&k != 0 {
		b.WriteString("not ")
	}
	b.WriteString(word + strings.Join(values, ",") + " ")
}

// values returns the values of the condition of kind k, as they are written. There are none if the rule does not have
// it.
func (r *Rule) values(k kinds) (out []string) {
	if k == ofProto && r.proto != 0 {
		return []string{r.proto.String()}
	}
	rest := r.rest
	if rest == nil {
		rest = &noRest
	}
	switch k {
	case ofSource:
		return texts(rest.src)
	case ofDest:
		return texts(r.prefixes)
	case ofName:
		return texts(rest.names)
	case ofPort:
		return texts(r.ports)
	case ofUser:
		return texts(rest.users)
	case ofCgroup:
		return rest.groups
	case ofExe:
		return rest.exes
	case ofList:
		if rest.list != nil {
			return []string{rest.list.path}
		}
	}
	return nil
}

var noRest rest

func texts[T fmt.Stringer](all []T) (out []string) {
	for _, x := range all {
		out = append(out, x.String())
	}
	return out
}

// String returns the range as it is written.
func (p portRange) String() string {
	if p.lo == p.hi {
		return strconv.Itoa(int(p.lo))
	}
	return fmt.Sprintf("%d-%d", p.lo, p.hi)
}
