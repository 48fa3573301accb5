// Command replicas keeps a number of running domains of one template, spread over the ready nodes of a fleet. It replaces the dead and
// those of lost nodes, deletes the surplus, and waits out lost connections and gateways that are killed.
//
//	replicas -group web -count 12 -template domain.json
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"log"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	virtfleet "virtfleet.dev/go"
	computev1 "virtfleet.dev/go/compute/v1"
	fleetv1 "virtfleet.dev/go/fleet/v1"
	"virtfleet.dev/go/informer"
)

const groupLabel = "replicas.example/group"

type controller struct {
	client   *virtfleet.Client
	domains  *informer.Informer[*computev1.Domain]
	nodes    *informer.Informer[*fleetv1.Node]
	template *computev1.Domain
	count    int
	made     map[string]time.Time // when, by uid, until the informer knows them
}

func main() {
	group := flag.String("group", "web", "the value of the label "+groupLabel)
	count := flag.Int("count", 3, "how many domains are to run")
	file := flag.String("template", "domain.json", "the domain to make, in the JSON of protobuf")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	template := &computev1.Domain{}
	text, err := os.ReadFile(*file)
	if err = errors.Join(err, protojson.Unmarshal(text, template)); err != nil {
		log.Fatal(err)
	}
	template.Labels = map[string]string{groupLabel: *group}
	client, err := virtfleet.Dial(ctx)
	if err == nil {
		err = run(ctx, client, *count, template)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func run(parent context.Context, client *virtfleet.Client, count int, template *computev1.Domain) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	ours := informer.Filter(`labels."` + groupLabel + `"="` + template.GetLabels()[groupLabel] + `"`)
	domains, nodes := informer.Domains(client, informer.Basic(), ours), informer.Nodes(client)
	queue := informer.NewQueue[string](informer.Backoff(100*time.Millisecond, 5*time.Second))
	wake(queue, domains)
	wake(queue, nodes)
	go func() { cancel(domains.Run(ctx)) }()
	go func() { cancel(nodes.Run(ctx)) }()
	if err := errors.Join(domains.WaitSynced(ctx), nodes.WaitSynced(ctx)); err != nil {
		return err
	}
	c := &controller{client, domains, nodes, template, count, map[string]time.Time{}}
	queue.Run(ctx, 1, func(ctx context.Context, _ string) error { return c.reconcile(ctx) })
	if parent.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

func wake[T informer.Resource](queue *informer.Queue[string], of *informer.Informer[T]) {
	handler := informer.Enqueue(queue, func(T) []string { return []string{"all"} })
	handler.ConnectionChanged = func(error) { queue.Add("all") }
	of.Handle(handler)
}

// reconcile makes what is there what is wanted. What it changes comes back through the informers and has it look again.
func (c *controller) reconcile(ctx context.Context) (err error) {
	if !c.domains.Connected() || !c.nodes.Connected() {
		return nil // what is known may be old; it looks again when both watches stand
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	load, lost := map[string]int{}, map[string]bool{}
	for node := range c.nodes.All() {
		lost[node.GetName()] = node.GetStatus().GetState() == fleetv1.NodeState_NODE_STATE_LOST
		cordoned := node.Spec != nil && node.Spec.Schedulable != nil && !*node.Spec.Schedulable
		if node.GetStatus().GetState() == fleetv1.NodeState_NODE_STATE_READY && !cordoned {
			load[node.GetName()] = 0
		}
	}
	alive := 0
	for domain := range c.domains.All() {
		delete(c.made, domain.GetUid())
		node, _, _ := strings.Cut(domain.GetName(), "/domains/")
		_, ready := load[node]
		switch {
		case ready && (!domain.GetStatus().GetActive() || alive >= c.count):
			err = errors.Join(err, c.delete(ctx, domain))
		case ready:
			load[node]++
			alive++
		case !lost[node]:
			alive++ // it is not in reach, and most likely runs
		}
	}
	maps.DeleteFunc(c.made, func(_ string, at time.Time) bool { return time.Since(at) > time.Minute })
	for missing := c.count - alive - len(c.made); missing > 0 && len(load) > 0; missing-- {
		node := slices.MinFunc(slices.Sorted(maps.Keys(load)), func(a, b string) int { return load[a] - load[b] })
		load[node]++
		err = errors.Join(err, c.create(ctx, node))
	}
	return err
}

func (c *controller) create(ctx context.Context, node string) error {
	operation, err := c.client.Domains.CreateDomain(ctx, &computev1.CreateDomainRequest{
		Parent: node, DomainId: "replica-" + strings.ToLower(rand.Text()[:10]), Domain: c.template, Start: &computev1.StartOptions{},
	})
	if err != nil {
		return err
	}
	domain, err := operation.Wait(ctx)
	if err == nil {
		c.made[domain.GetUid()] = time.Now()
	}
	return err
}

func (c *controller) delete(ctx context.Context, domain *computev1.Domain) error {
	operation, err := c.client.Domains.DeleteDomain(ctx, &computev1.DeleteDomainRequest{
		Name: domain.GetName(), ExpectedUid: domain.GetUid(), Stop: true, AllowMissing: true,
	})
	if err == nil {
		_, err = operation.Wait(ctx)
	}
	return err
}
